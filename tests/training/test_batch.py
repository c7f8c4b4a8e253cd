"""The micro-batch that fits into memory, and warnings if none does."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from plans import make_plan

from training import TrainingError, batch
from training.batch import check_memory, largest_fitting_batch

GB = 1e9
ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), distributed_type=DistributedType.NO)
FSDP = SimpleNamespace(device=torch.device("cpu"), distributed_type=DistributedType.FSDP)


@pytest.fixture
def plan():
    return make_plan(12, 768, 12, 1024, 4, 2, "bf16")


@pytest.fixture
def set_memory(monkeypatch):
    def set_memory(free, total):
        monkeypatch.setattr(batch, "free_memory", lambda device: free * GB)
        monkeypatch.setattr(batch, "total_memory", lambda device: total * GB)

    return set_memory


@pytest.mark.parametrize(
    ("free", "micro_batch_size", "words"),
    [
        (64, 4, []),
        (4, 4, ["4 sequences", "4.58 GB", "4.00 GB", "--batch.micro_batch_size 2 or auto"]),
        (4, 1000, ["8 sequences", "5.56 GB", "--batch.micro_batch_size 2 or auto"]),  # a step has 8
        (1, 4, ["1.00 GB", "smaller model"]),
        (1, "auto", ["1 sequence ", "smaller model"]),
        (4, "auto", []),
    ],
)
def test_too_little_memory_is_a_warning_with_both_numbers(plan, set_memory, free, micro_batch_size, words, capsys):
    plan.batch.micro_batch_size = micro_batch_size
    set_memory(free, 64)
    check_memory(plan, ACCELERATOR, is_dry_run=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == bool(words)
    assert all(word in lines[0] for word in words), lines
    check_memory(plan, FSDP, is_dry_run=False)  # the estimate does not cover it
    assert not capsys.readouterr().out


def test_model_larger_than_the_machine_is_an_error_except_in_a_dry_run(plan, set_memory, capsys):
    set_memory(1, 1.4)  # 12 bytes per parameter are 1.49 GB
    check_memory(plan, ACCELERATOR, is_dry_run=True)
    assert "warning" in capsys.readouterr().out
    with pytest.raises(TrainingError, match=r"1\.49 GB .*1\.40 GB"):
        check_memory(plan, ACCELERATOR, is_dry_run=False)


@pytest.mark.parametrize(
    ("estimate", "local_world_size", "expected"),
    [(lambda size: 100 * size, 1, 8), (lambda size: 100 * size, 4, 2), (lambda size: 10**6, 1, 1)],
)
def test_largest_fitting_batch_on_a_cpu_by_the_estimate(monkeypatch, estimate, local_world_size, expected):
    monkeypatch.setattr(batch, "free_memory", lambda device: 1000)
    options = {"estimate": estimate, "probe": None, "device": torch.device("cpu")}
    assert largest_fitting_batch([1, 2, 4, 8, 16], **options, local_world_size=local_world_size) == expected


def test_largest_fitting_batch_on_a_gpu_by_probing(monkeypatch):
    monkeypatch.setattr(batch, "free_memory", lambda device: 1000)
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(empty_cache=lambda: None))
    probed = []

    def probe(size):
        probed.append(size)
        if size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    options = {"estimate": lambda size: 100 * size, "device": torch.device("cuda"), "local_world_size": 1}
    assert largest_fitting_batch([1, 2, 4, 8, 16], probe=probe, **options) == 4
    assert probed == [8, 4]  # 16 is too far above the estimate
