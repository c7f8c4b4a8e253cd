"""The accelerator's settings, launchers that are refused, and memory that glibc keeps."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
from accelerate.utils import DistributedType

from common.errors import UserError
from training import TrainingError, distributed
from training.distributed import (
    isolated_accelerator_state,
    resolve_mixed_precision,
    run_on_main,
    start_accelerator,
)

ROOT = Path(__file__).resolve().parents[2]

# Page faults of ten 64 MB tensors, one after the other, in a process of its own.
COUNT_PAGE_FAULTS = """
import os, resource, torch
from training.distributed import keep_freed_memory

torch.set_num_threads(1)
for keep in (False, True):
    if os.fork() == 0:
        if keep:
            keep_freed_memory()
        for _ in range(12):  # until the heap has its size: aligned blocks leave gaps at first
            torch.ones(2**24)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.ones(2**24)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_freed_memory_is_not_faulted_in_again():
    command = [sys.executable, "-c", COUNT_PAGE_FAULTS]
    default, kept = map(int, subprocess.run(command, capture_output=True, check=True, cwd=ROOT).stdout.split())
    assert default > 10 * 2**26 // 2**21  # at least one per huge page, if those are in use
    assert kept < default / 5


@pytest.fixture
def _not_launched(monkeypatch):
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(distributed, "keep_freed_memory", lambda: None)  # it would last


@pytest.mark.usefixtures("_not_launched")
def test_accelerator_settings():
    with isolated_accelerator_state():
        accelerator = start_accelerator("no", "cpu")
        assert accelerator.ddp_handler.gradient_as_bucket_view
        assert accelerator.init_handler.timeout.total_seconds() == 30 * 60
        assert run_on_main(int, "11", base=2) == 3


@pytest.mark.usefixtures("_not_launched")
def test_deepspeed_is_refused_before_it_is_imported(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(TrainingError, match=r"DeepSpeed.*FSDP2") as error:
        start_accelerator("no", "cpu")
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("_not_launched")
@pytest.mark.parametrize(
    ("kind", "name"), [(DistributedType.FSDP, "fsdp_version: 1"), (DistributedType.MEGATRON_LM, "Megatron")]
)
def test_unsupported_sharding_is_refused(kind, name, monkeypatch):
    accelerator = SimpleNamespace(num_processes=1, distributed_type=kind, is_fsdp2=False)
    monkeypatch.setattr(distributed, "Accelerator", lambda **_: accelerator)
    with pytest.raises(TrainingError, match=f"{name}.*FSDP2"):
        start_accelerator("no", "cpu")


@pytest.mark.usefixtures("_not_launched")
def test_fsdp_on_a_cpu_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with isolated_accelerator_state(), pytest.raises(TrainingError, match=r"FSDP, which needs GPUs.*cpu.yaml"):
        start_accelerator("no", "cpu")


@pytest.mark.usefixtures("_not_launched")
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Gloo connectFullMesh failed with SO_ERROR:\nConnection refused, remote=[127.0.0.1]"),
        torch.distributed.DistNetworkError("The client socket\nhas timed out"),
    ],
)
def test_machines_that_cannot_connect_say_so_on_one_line(error, monkeypatch, capsys):
    def fail(**_):
        raise error

    environment = {"RANK": "8", "LOCAL_RANK": "0", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
    for name, value in {**environment, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "Accelerator", fail)
    with pytest.raises(TrainingError, match=r"process 8 of 16.*10\.0\.0\.1:29500.*GLOO_SOCKET_IFNAME") as raised:
        start_accelerator("no", "cpu")
    assert "\n" not in str(raised.value)
    assert "process 8 of 16: waits at 10.0.0.1:29500" in capsys.readouterr().out


@pytest.mark.usefixtures("_not_launched")
def test_other_errors_of_torch_are_not_taken_for_a_lost_connection(monkeypatch):
    def fail(**_):
        raise RuntimeError("CUDA error: invalid device ordinal")

    monkeypatch.setattr(distributed, "Accelerator", fail)
    with pytest.raises(RuntimeError, match="invalid device"):
        start_accelerator("no", "cpu")


@pytest.mark.usefixtures("_not_launched")
def test_processes_that_do_not_see_each_other_are_refused(monkeypatch):
    """Accelerators that do not notice the launcher, as accelerate's do for some CPU launches."""

    def alone(**kwargs):
        with monkeypatch.context() as patch:
            for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
                patch.delenv(name)
            return accelerate.Accelerator(**kwargs)

    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "Accelerator", alone)
    with isolated_accelerator_state(), pytest.raises(UserError, match="started 2 processes, but this one sees 1"):
        start_accelerator("no", "cpu")
    accelerate.state.PartialState._reset_state()


@pytest.mark.usefixtures("_not_launched")
@pytest.mark.parametrize(
    ("setting", "launcher", "device_type", "hardware", "expected"),
    [
        ("auto", None, "cpu", "bf16", "bf16"),
        ("auto", None, "cpu", "no", "no"),
        ("auto", "no", "cuda", "bf16", "bf16"),  # the launcher's default
        ("auto", "no", "cuda", "fp16", "fp16"),  # a T4
        ("auto", "bf16", "cpu", "no", "bf16"),
        ("auto", "fp16", "cuda", "bf16", "fp16"),
        ("no", None, "cuda", "bf16", "no"),
        ("bf16", "fp16", "cpu", "no", "bf16"),
        ("auto", "fp8", "cuda", "bf16", TrainingError("fp8")),
        ("auto", "fp16", "cpu", "bf16", TrainingError("needs an NVIDIA or AMD GPU")),
        ("fp16", None, "mps", "bf16", TrainingError("needs an NVIDIA or AMD GPU")),
    ],
)
def test_mixed_precision(setting, launcher, device_type, hardware, expected, monkeypatch):
    monkeypatch.setattr(distributed, "half_precision", lambda device_type: hardware)
    if launcher:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    if isinstance(expected, str):
        assert resolve_mixed_precision(setting, device_type) == expected
    else:
        with pytest.raises(TrainingError, match=str(expected)):
            resolve_mixed_precision(setting, device_type)


@pytest.mark.usefixtures("_not_launched")
def test_bf16_on_a_gpu_without_it_becomes_fp16_aloud(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "half_precision", lambda device_type: "fp16")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert resolve_mixed_precision("bf16", "cuda") == "fp16"
    assert "Tesla T4 has no bfloat16: training in fp16" in capsys.readouterr().out


@pytest.mark.usefixtures("_not_launched")
def test_memory_of_an_apple_gpu_ends_before_the_swap_space(monkeypatch):
    limits, device = [], torch.device("mps")
    monkeypatch.setattr(distributed, "half_precision", lambda device_type: "bf16")
    monkeypatch.setattr(torch.mps, "set_per_process_memory_fraction", limits.append)
    accelerator = SimpleNamespace(device=device, distributed_type="NO", num_processes=1, mixed_precision="bf16")
    monkeypatch.setattr(distributed, "Accelerator", lambda **_: accelerator)
    start_accelerator("auto", "mps")
    assert limits == [1.0]


def test_several_gpus_on_windows_are_refused(monkeypatch):
    """torch has no NCCL there, and accelerate would select it."""
    monkeypatch.setattr(distributed.os, "name", "nt")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match=r"several GPUs .* Windows: use one, .*single_gpu\.yaml"):
        start_accelerator("no", "cuda")
