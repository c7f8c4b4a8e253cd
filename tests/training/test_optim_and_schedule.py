import math

import pytest
import torch

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from training import TrainingError
from training.config import OptimConfig
from training.optim import build_optimizer
from training.precision import resolve_mixed_precision
from training.schedule import learning_rate

LECTURE = OptimConfig(lr=6e-4, warmup_steps=715, final_lr_fraction=0.1)


def lecture_get_lr(it):
    """The lecture's schedule, written from its description as the independent reference."""
    if it < 715:
        return 6e-4 * (it + 1) / 715
    if it > 19073:
        return 6e-5
    ratio = (it - 715) / (19073 - 715)
    return 6e-5 + 0.5 * (1 + math.cos(math.pi * ratio)) * (6e-4 - 6e-5)


def test_schedule_is_the_lectures():
    for step in (0, 1, 714, 715, 716, 5000, 19072, 19073, 30000):
        assert learning_rate(step, LECTURE, max_steps=19073) == pytest.approx(lecture_get_lr(step), rel=1e-12)


def test_schedule_with_a_run_shorter_than_its_warm_up():
    values = [learning_rate(step, OptimConfig(lr=1.0, warmup_steps=10), max_steps=5) for step in range(5)]
    assert values == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert learning_rate(0, OptimConfig(lr=1.0, warmup_steps=0), max_steps=5) == 1.0


def test_weight_decay_on_matrices_and_embeddings_only():
    model = GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=2, n_head=2, n_embd=16, n_positions=8))
    optimizer = build_optimizer(model, OptimConfig(), "cpu")
    name_of = {p: name for name, p in model.named_parameters()}
    decayed, free = ({name_of[p] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert decayed | free == set(name_of.values())
    assert not decayed & free
    assert all(name.endswith(".weight") and ".ln_" not in name for name in decayed)
    assert all(name.endswith(".bias") or ".ln_" in name for name in free)
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= decayed
    assert optimizer.defaults["fused"]


def test_auto_precision(monkeypatch):
    monkeypatch.setattr("training.precision.hardware_has_bf16", lambda: True)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert resolve_mixed_precision("auto") == "bf16"
    assert resolve_mixed_precision("no") == "no"
    monkeypatch.setattr("training.precision.hardware_has_bf16", lambda: False)
    assert resolve_mixed_precision("auto") == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert resolve_mixed_precision("auto") == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(TrainingError, match="fp16"):
        resolve_mixed_precision("auto")
    assert resolve_mixed_precision("bf16") == "bf16"


def test_hardware_probe_is_a_yes_or_no(monkeypatch):
    from training.precision import hardware_has_bf16

    of_the_cpu = hardware_has_bf16() if not torch.accelerator.is_available() else None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not of_the_cpu)
    assert hardware_has_bf16() is not of_the_cpu
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # the launcher was told to leave the GPU alone
    assert of_the_cpu is None or hardware_has_bf16() is of_the_cpu
    monkeypatch.undo()
    assert hardware_has_bf16() in (True, False)
    assert isinstance(torch.accelerator.is_available(), bool)  # train.py asks it, torch 2.10 must have it
