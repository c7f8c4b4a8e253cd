"""What is known before the first step: memory, time, money, peak, micro-batch."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from modeling_gpt2repro import GPT2ReproConfig
from training import TrainingError, microbatch
from training.config import BatchConfig, Config, ModelConfig
from training.hardware import DEVICES, FLOPS_PER_TOKEN_124M, Hardware, look_up, measured_matmul_flops, peak_flops
from training.microbatch import largest_that_fits
from training.plan import Plan, duration, repetition_warning

# Peak resident memory, GB, of processes that ran two steps of train.py (benchmarks/memory.py; RECORDS.md).
MEASURED = [
    (12, 768, 12, 1024, 4, 2, "bf16", 0.0, 124_439_808, 4.73),
    (12, 768, 12, 1024, 4, 1, "bf16", 0.0, 124_439_808, 3.87),
    (12, 768, 12, 1024, 2, 2, "no", 0.0, 124_439_808, 4.42),
    (12, 768, 12, 512, 8, 2, "bf16", 0.1, 124_439_808, 11.32),
    (24, 1024, 16, 1024, 1, 2, "bf16", 0.0, 354_823_168, 8.17),
    (6, 384, 6, 256, 96, 2, "no", 0.0, 30_044_544, 6.69),
    (6, 384, 6, 256, 2, 2, "bf16", 0.0, 30_044_544, 1.24),
]


def plan(layers, width, heads, seq_len, rows, accumulation, precision, dropout, parameters, **changes):
    """A training.plan.Plan, of one process on a CPU."""
    hardware = {"name": "cpu", "num_processes": 1, "processes_here": 1, "peak_flops": 1e12, "peak_source": "made up"}
    return Plan(
        GPT2ReproConfig(n_layer=layers, n_embd=width, n_head=heads),
        parameters,
        Config(
            model=ModelConfig(dropout=dropout),
            batch=BatchConfig(tokens_per_step=rows * seq_len * accumulation, seq_len=seq_len),
            **changes,
        ),
        Hardware(device=torch.device("cpu"), mixed_precision=precision, dollars_an_hour=None, **hardware),
    )


@pytest.mark.parametrize("row", MEASURED, ids=str)
def test_memory_is_within_15_percent_of_what_was_measured(row):
    *settings, peak = row
    assert plan(*settings).memory(micro_batch_size=row[4]).total / 1e9 == pytest.approx(peak, rel=0.15)


def test_gradients_of_several_processes_lie_in_the_buckets():
    """DDP's; while micro-batches are added up they lie beside these."""
    for accumulation, copies in ((2, 1), (4, 2)):
        two = plan(12, 768, 12, 1024, 4, accumulation, "bf16", 0.0, 124_439_808)
        two.hardware = two.hardware._replace(num_processes=2)
        assert two.memory(micro_batch_size=4).gradients == copies * 4 * 124_439_808


def test_flops_and_time():
    the_lectures = plan(12, 768, 12, 1024, 64, 8, "bf16", 0.0, 124_439_808, max_steps=19_073)
    assert the_lectures.total_tokens == 9_999_745_024
    assert the_lectures.flops_per_token == FLOPS_PER_TOKEN_124M
    assert the_lectures.flops_per_token == pytest.approx(0.857e9, rel=0.01)  # the figure of the field
    lines = the_lectures.time_and_money()
    assert [line.split()[1] for line in lines] == ["A100", "H100", "H200"]
    assert all("estimated" in line for line in lines)
    # llm.c: 94 minutes on eight A100.
    assert "1:34" in lines[0]
    assert duration(90061) == "1 day, 1:01:01"
    assert duration(3.2e9) == "101 years"
    assert duration(1e300).endswith(" years")  # more than timedelta takes


def test_data_that_is_repeated_often_is_warned_of():
    assert [bool(repetition_warning(epochs)) for epochs in (0.1, 4.4, 4.6, 100)] == [False, False, True, True]
    assert "100.0 times" in repetition_warning(100)[0]


GB = 1e9


@pytest.mark.parametrize(
    ("free", "total", "micro_batch_size", "words"),
    [
        (64, 64, 4, []),
        (4, 64, 4, ["4 sequences", "4.58 GB", "4.00 GB", "--batch.micro_batch_size 2 or auto"]),
        (4, 64, 1000, ["8 sequences", "5.56 GB", "--batch.micro_batch_size 2 or auto"]),  # all that a step has
        (1, 64, 4, ["1.00 GB", "smaller model"]),
        (1, 64, "auto", ["1 sequence ", "smaller model"]),
        (4, 64, "auto", []),
    ],
)
def test_too_little_memory_is_a_warning_with_both_numbers(monkeypatch, free, total, micro_batch_size, words):
    settings = plan(12, 768, 12, 1024, 4, 2, "bf16", 0.0, 124_439_808)
    settings.batch.micro_batch_size = micro_batch_size
    monkeypatch.setattr(microbatch, "free_memory", lambda device: free * GB)
    monkeypatch.setattr(microbatch, "_total_memory", lambda device: total * GB)
    accelerator = SimpleNamespace(device=torch.device("cpu"), distributed_type=DistributedType.NO)
    lines = microbatch.check_memory(settings, accelerator, is_dry_run=False)
    assert len(lines) == bool(words)
    assert all(word in lines[0] for word in words), lines
    accelerator.distributed_type = DistributedType.FSDP  # not in the estimate
    assert microbatch.check_memory(settings, accelerator, is_dry_run=False) == []


def test_a_model_larger_than_the_machine_is_an_error_but_in_a_dry_run(monkeypatch):
    settings = plan(12, 768, 12, 1024, 4, 2, "bf16", 0.0, 124_439_808)
    monkeypatch.setattr(microbatch, "free_memory", lambda device: GB)
    monkeypatch.setattr(microbatch, "_total_memory", lambda device: 2 * GB)
    accelerator = SimpleNamespace(device=torch.device("cpu"), distributed_type=DistributedType.NO)
    assert microbatch.check_memory(settings, accelerator, is_dry_run=True)
    monkeypatch.setattr(microbatch, "_total_memory", lambda device: 1.4 * GB)  # 12 bytes a parameter are 1.49 GB
    with pytest.raises(TrainingError, match=r"1\.49 GB a process.*1\.40 GB"):
        microbatch.check_memory(settings, accelerator, is_dry_run=False)


def test_peak():
    assert look_up("NVIDIA H100 80GB HBM3") is DEVICES["H100"]
    assert look_up("NVIDIA H100 PCIe") is DEVICES["H100 PCIe"]
    assert look_up("NVIDIA L40S") is DEVICES["L40S"]
    assert look_up("NVIDIA A100-SXM4-80GB") is DEVICES["A100"]
    # Not known, a part of one, or a slower kind of one: measured.
    for name in ("GeForce GTX 1080", "L40", "A100-SXM4-40GB MIG 3g.20gb", "GeForce RTX 4090 Laptop GPU", "H100 NVL"):
        assert look_up(f"NVIDIA {name}") is None, name
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    rate = measured_matmul_flops(torch.device("cpu"), torch.float32, seconds=0.05)
    assert torch.equal(torch.rand(1), expected)  # the run's random numbers are not touched
    assert 1e9 < rate < 1e14
    assert peak_flops(torch.device("cpu"), torch.float32)[1] == "measured matmul"


def test_largest_micro_batch(monkeypatch):
    monkeypatch.setattr(microbatch, "free_memory", lambda device: 1000)
    cpu, sizes = torch.device("cpu"), [1, 2, 4, 8, 16]
    options = {"needs": lambda size: 100 * size, "step_of": None}
    assert largest_that_fits(sizes, **options, device=cpu, processes_here=1) == 8
    assert largest_that_fits(sizes, **options, device=cpu, processes_here=4) == 2
    assert largest_that_fits(sizes, **options | {"needs": lambda size: 10**6}, device=cpu, processes_here=1) == 1

    # On a GPU the trial has the last word.
    tried = []

    def step_of(size):
        tried.append(size)
        if size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "get_device_module", lambda device: type("gpu", (), {"empty_cache": lambda: None}))
    options["step_of"] = step_of
    assert largest_that_fits(sizes, **options, device=torch.device("cuda"), processes_here=1) == 4
    assert tried == [8, 4]  # 16 is too far above the estimate
