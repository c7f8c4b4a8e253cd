"""Known before the first step: memory, time, cost, peak FLOP/s."""

import dataclasses

import pytest
import torch
from plans import make_plan

from modeling_gpt2repro import GPT2ReproConfig
from training.cards import card_of_device
from training.estimate import (
    format_duration,
    measure_matmul_flops,
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


# GB that torch's allocator had allocated at the peak, for GPT-2 124M in bfloat16 on a GPU that computes nothing:
# sequences, (accumulation 1, 2) not compiled, accumulation 2 compiled (RECORDS.md).
COUNTED = [
    (4, 5.85, 6.35, 4.13),
    (8, 9.84, 10.34, 5.93),
    (16, 12.21, 12.71, 8.77),
    (32, 16.64, 17.14, 14.45),
    (64, 25.46, 25.96, 25.80),
]


@pytest.mark.parametrize(("rows", "once", "twice", "compiled"), COUNTED)
def test_memory_estimate_of_a_gpu_is_within_10_percent_of_counted(rows, once, twice, compiled):
    for accumulation, is_compiled, peak in ((1, False, once), (2, False, twice), (2, True, compiled)):
        plan = make_plan(12, 768, 12, 1024, rows, accumulation, "bf16", device="cuda", compiled=is_compiled)
        memory = plan.estimate_memory(rows)  # its base, the CUDA context, is not torch's
        assert (memory.total - memory.base) / 1e9 == pytest.approx(peak, rel=0.1), (accumulation, is_compiled)


@pytest.mark.parametrize(("rows", "compiled", "peak"), [(4, False, 5.45), (64, False, 11.41), (64, True, 7.18)])
def test_memory_estimate_with_activation_checkpointing(rows, compiled, peak):
    settings = {"device": "cuda", "compiled": compiled, "activation_checkpointing": True}
    memory = make_plan(12, 768, 12, 1024, rows, 2, "bf16", **settings).estimate_memory(rows)
    assert (memory.total - memory.base) / 1e9 == pytest.approx(peak, rel=0.1)


def test_memory_estimate_of_an_apple_gpu_has_the_weights_of_attention():
    apple, nvidia = (make_plan(12, 768, 12, 1024, 2, 2, "bf16", device=device) for device in ("mps", "cuda"))
    difference = apple.estimate_memory(2).activations - nvidia.estimate_memory(2).activations
    assert difference == 2 * 12 * 12 * 1024**2 * 4  # sequences, layers, heads, T x T, float32


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


def test_sharded_state_and_gradients():
    """On eight GPUs, 1558M fits into 24 GB, one sequence at a time. Only the last micro-batch shards the gradients."""
    plan = make_plan(48, 1600, 25, 1024, 1, 16, "bf16", device="cuda", activation_checkpointing=True, sharded=True)
    eight = dataclasses.replace(plan, hardware=plan.hardware._replace(num_processes=8))
    memory = eight.estimate_memory(1)
    assert memory.state == 12 * 1_557_611_200 / 8
    assert memory.gradients == 4 * eight.num_parameters and memory.total < 24e9
    at_once = dataclasses.replace(eight, batch=dataclasses.replace(eight.batch, tokens_per_step=8 * 1024))
    assert at_once.estimate_memory(1).gradients == 4 * eight.num_parameters / 8


def test_flops_of_the_lectures_run():
    plan = make_plan(12, 768, 12, 1024, 64, 8, "bf16", max_steps=19_073)
    assert plan.total_tokens == 9_999_745_024
    assert plan.flops_per_token == 855_166_464
    assert plan.flops_per_token == pytest.approx(0.857e9, rel=0.01)  # usually published


def test_format_duration():
    assert format_duration(90061) == "1 day, 1:01:01"
    assert format_duration(3.2e9) == "101 years"
    assert format_duration(1e300).endswith(" years")  # too much for timedelta


def test_frequent_repetition_of_the_data_is_warned_of(capsys):
    for epochs in (0.1, 4.4, 4.6, 100):
        warn_of_repetition("shards/a", epochs)
    warnings = capsys.readouterr().out.splitlines()
    assert ["shards/a is seen 4.6 times" in warnings[0], "100.0 times" in warnings[1], len(warnings)] == [True, True, 2]


def test_card_of_device():
    for name in ("H100", "H100 PCIe", "L40S", "T4"):
        assert card_of_device(f"NVIDIA {name}").name == name
    assert card_of_device("NVIDIA H100 80GB HBM3").name == "H100"
    assert card_of_device("NVIDIA A100-SXM4-80GB").name == "A100"
    assert card_of_device("NVIDIA A100-SXM4-40GB").name == "A100 40GB"
    # Unknown, a part of a card, or another kind.
    for name in ("GTX 1080", "L40", "A100-SXM4-40GB MIG 3g.20gb", "RTX 4090 Laptop GPU", "H100 NVL", "RTX 3090 Ti"):
        assert card_of_device(f"NVIDIA {name}") is None, name


def test_measured_peak_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    rate = measure_matmul_flops(torch.device("cpu"), torch.float32, seconds=0.05)
    assert torch.equal(torch.rand(1), expected)
    assert 1e9 < rate < 1e14
