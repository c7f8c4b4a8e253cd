"""Known before the first step: memory, time, cost, peak FLOP/s."""

import dataclasses

import pytest
import torch
from plans import make_plan

from modeling_gpt2repro import GPT2ReproConfig
from training.estimate import (
    DEVICES,
    DOLLARS_PER_HOUR,
    FLOPS_PER_TOKEN_124M,
    find_device,
    format_duration,
    measure_matmul_flops,
    peak_flops,
    warn_of_repetition,
)

# Layers, width, heads, T, sequences, accumulation, precision, dropout; and the peak resident memory, GB, of
# processes that ran two steps of train.py (benchmarks/memory.py; RECORDS.md).
MEASURED = [
    (12, 768, 12, 1024, 4, 2, "bf16", 0.0, 4.73),
    (12, 768, 12, 1024, 4, 1, "bf16", 0.0, 3.87),
    (12, 768, 12, 1024, 2, 2, "no", 0.0, 4.42),
    (12, 768, 12, 512, 8, 2, "bf16", 0.1, 11.32),
    (24, 1024, 16, 1024, 1, 2, "bf16", 0.0, 8.17),
    (6, 384, 6, 256, 96, 2, "no", 0.0, 6.69),
    (6, 384, 6, 256, 2, 2, "bf16", 0.0, 1.24),
]


@pytest.mark.parametrize("row", MEASURED, ids=str)
def test_memory_estimate_is_within_15_percent_of_measured(row):
    *settings, peak = row
    plan = make_plan(*settings)
    assert plan.estimate_memory(micro_batch_size=row[4]).total / 1e9 == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize(
    ("size", "num_parameters"),
    [("124M", 124_439_808), ("350M", 354_823_168), ("774M", 774_030_080), ("1558M", 1_557_611_200)],
)
def test_number_of_parameters(size, num_parameters):
    plan = dataclasses.replace(make_plan(1, 8, 1, 8, 1, 1, "no"), shape=GPT2ReproConfig.from_size(size))
    assert plan.num_parameters == num_parameters


def test_gradients_of_several_processes_include_the_buckets():
    """With several micro-batches, DDP's buckets come on top of the gradients."""
    for accumulation, copies in ((2, 1), (4, 2)):
        plan = make_plan(12, 768, 12, 1024, 4, accumulation, "bf16")
        two = dataclasses.replace(plan, hardware=plan.hardware._replace(num_processes=2))
        assert two.estimate_memory(micro_batch_size=4).gradients == copies * 4 * 124_439_808


def test_flops_and_rental_of_the_lectures_run():
    plan = make_plan(12, 768, 12, 1024, 64, 8, "bf16", max_steps=19_073)
    assert plan.total_tokens == 9_999_745_024
    assert plan.flops_per_token == FLOPS_PER_TOKEN_124M
    assert plan.flops_per_token == pytest.approx(0.857e9, rel=0.01)  # usually published
    lines = plan.describe_rental().splitlines()
    assert [line.split()[1] for line in lines] == ["A100", "H100", "H200"]
    assert all("estimated" in line for line in lines)
    assert "1:34" in lines[0]  # llm.c: 94 minutes on eight A100


def test_prices_are_of_known_devices():
    assert set(DOLLARS_PER_HOUR) <= set(DEVICES)


def test_format_duration():
    assert format_duration(90061) == "1 day, 1:01:01"
    assert format_duration(3.2e9) == "101 years"
    assert format_duration(1e300).endswith(" years")  # too much for timedelta


def test_frequent_repetition_of_the_data_is_warned_of(capsys):
    for epochs in (0.1, 4.4, 4.6, 100):
        warn_of_repetition("shards/a", epochs)
    warnings = capsys.readouterr().out.splitlines()
    assert ["shards/a is seen 4.6 times" in warnings[0], "100.0 times" in warnings[1], len(warnings)] == [True, True, 2]


def test_find_device():
    assert find_device("NVIDIA H100 80GB HBM3") == "H100"
    assert find_device("NVIDIA H100 PCIe") == "H100 PCIe"
    assert find_device("NVIDIA L40S") == "L40S"
    assert find_device("NVIDIA A100-SXM4-80GB") == "A100"
    # Unknown, a part of a device, or a slower kind.
    for name in ("GeForce GTX 1080", "L40", "A100-SXM4-40GB MIG 3g.20gb", "GeForce RTX 4090 Laptop GPU", "H100 NVL"):
        assert find_device(f"NVIDIA {name}") is None, name


def test_measured_peak_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    rate = measure_matmul_flops(torch.device("cpu"), torch.float32, seconds=0.05)
    assert torch.equal(torch.rand(1), expected)
    assert 1e9 < rate < 1e14
    assert peak_flops(torch.device("cpu"), torch.float32)[1] == "measured matmul"
