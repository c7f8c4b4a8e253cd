"""GPUs that torch cannot use, 16-bit formats, and what torch.compile needs: simulated, each an error on one line."""

import sys
from types import SimpleNamespace

import pytest
import torch

from training import TrainingError, machine

T4 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.fixture
def nvidia(monkeypatch):
    """nvidia(cuda, capability): a machine with an NVIDIA GPU and a build of torch; no capability: CUDA cannot start."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "_has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)

    def make(cuda="13.0", capability=None):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: T4)

    return make


@pytest.mark.parametrize(
    ("build", "message"),
    [
        ({"cuda": None}, "built without CUDA: install a build with it .* add --cpu"),
        ({}, "cannot start CUDA 13.0: the driver is too old or does not run.* add --cpu"),
        ({"capability": (7, 0)}, "Tesla V100 has compute capability 7.0, .* no code for it, only sm_75.* add --cpu"),
    ],
    ids=["CPU build", "old driver", "old card"],
)
def test_gpu_that_torch_cannot_use_is_an_error(nvidia, build, message):
    nvidia(**build)
    with pytest.raises(TrainingError, match=message):
        machine.check_gpu()


@pytest.mark.parametrize("capability", [(7, 5), (8, 6), (8, 9), (9, 0), (12, 1), (13, 0)])
def test_gpu_with_code_for_it_is_accepted(nvidia, capability):
    nvidia(capability=capability)
    machine.check_gpu()


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_and_machines_without_one_are_accepted(nvidia, monkeypatch, hidden):
    nvidia(cuda=None)
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        machine.check_gpu()
    monkeypatch.setattr(machine, "_has_nvidia_gpu", lambda: False)
    machine.check_gpu()


@pytest.mark.skipif(sys.platform != "linux", reason="a stand-in for nvidia-smi that is a shell script")
@pytest.mark.parametrize(("output", "found"), [("echo GPU 0: T4", True), ("echo No devices", False), ("exit 9", False)])
def test_nvidia_smi_is_asked_where_there_are_no_device_files(tmp_path, monkeypatch, output, found):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{output}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(machine, "Path", lambda name: SimpleNamespace(glob=lambda pattern: []))
    assert machine._has_nvidia_gpu() is found


def test_cpu_is_used_on_request(nvidia, monkeypatch):
    nvidia()
    assert machine.find_device(use_cpu=True) == "cpu"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert machine.find_device() == "cpu"
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    with pytest.raises(TrainingError, match="add --cpu"):
        machine.find_device()


def test_half_precision_of_gpus(monkeypatch):
    for has_bf16, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has_bf16: has)
        assert machine.half_precision("cuda") == expected
    for has_bf16, expected in ((True, "bf16"), (False, "no")):
        monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda has=has_bf16: has)
        assert machine.half_precision("xpu") == expected
    assert machine.half_precision("mps") == "bf16"


def test_compiler_that_is_missing_is_an_error_with_the_package(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match=r"needs Triton: pip install triton.*--compile false"):
        machine.can_compile("cuda")
    assert machine.can_compile("cpu")
    assert machine.can_compile("cuda", is_dry_run=True)  # perhaps for another machine
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(TrainingError, match=r"needs Python\.h: apt install python3-dev.*--compile false"):
        machine.can_compile("cpu")
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TrainingError, match=r"needs a C compiler: .*--compile false"):
        machine.can_compile("cpu")
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: "triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    with pytest.raises(TrainingError, match=r"needs a GPU with compute capability 7.0 .*--compile false"):
        machine.can_compile("cuda")
    assert not machine.can_compile("mps")
    assert "off on Apple's GPUs" in capsys.readouterr().out
