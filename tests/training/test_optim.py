import math
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from training.config import OptimConfig
from training.optim import build_optimizer, learning_rate, newton_schulz, step_if_finite
from training.sharding import full_state_dict, load_moments

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


def test_linear_cooldown():
    optim = OptimConfig(lr=1.0, warmup_steps=2, final_lr_fraction=0.2, cooldown_fraction=0.5)
    values = [learning_rate(step, optim, max_steps=10) for step in range(12)]
    assert values == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.84, 0.68, 0.52, 0.36, 0.2, 0.2])
    optim = OptimConfig(lr=1.0, warmup_steps=4, final_lr_fraction=0.0, cooldown_fraction=1.0)
    values = [learning_rate(step, optim, max_steps=5) for step in range(6)]
    assert values == pytest.approx([0.25, 0.5, 0.6, 0.4, 0.2, 0])


def small_model():
    torch.manual_seed(0)
    return GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=2, n_head=2, n_embd=16, n_positions=8, vocab_size=31))


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def wrap(optimizer):
    """Return what stepping and saving need of accelerate's wrapped optimizer."""
    return SimpleNamespace(
        optimizer=optimizer,
        step=optimizer.step,
        state=optimizer.state,
        param_groups=optimizer.param_groups,
        state_dict=optimizer.state_dict,
        load_state_dict=optimizer.load_state_dict,
    )


MUON = OptimConfig(lr=1e-2, weight_decay=0.1, muon_lr=0.02, muon_weight_decay=0.05)


@pytest.mark.parametrize("batch_numel", [2**26, 1])
def test_muon_adamw_computes_the_updates_of_torch(monkeypatch, batch_numel):
    """
    Three steps, the second with half the learning rate, compared with separate optimizers and separate Q, K and V.

    In float32, since batched matmuls in bfloat16 round differently on some machines.
    """
    monkeypatch.setattr("training.optim._BATCH_NUMEL", batch_numel)
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor)
    model, reference = small_model(), small_model()
    optim = OptimConfig(lr=1e-2, weight_decay=0.1, muon_lr=0.02, muon_weight_decay=5.0)  # so much that it shows
    optimizer = build_optimizer(model, optim)
    blocks = [p for name, p in reference.named_parameters() if ".h." in name and p.dim() == 2]
    rest = [p for p in reference.parameters() if all(p is not block for block in blocks)]
    assert len(blocks) == 8
    parts_of = {p: p.detach().chunk(3) if p.shape[0] == 3 * p.shape[1] else (p.detach(),) for p in blocks}  # views
    assert [len(parts) for parts in parts_of.values()] == [3, 1, 1, 1] * 2
    parts_of = {p: [torch.nn.Parameter(part) for part in parts] for p, parts in parts_of.items()}
    pieces = [part for parts in parts_of.values() for part in parts]
    muon = torch.optim.Muon(pieces, lr=0.02, weight_decay=5.0, momentum=0.95)
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.dim() == 2], "weight_decay": 0.1},
            {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    for step, factor in enumerate((1.0, 0.5, 1.0)):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * factor * group["lr_ratio"]
        muon.param_groups[0]["lr"] = 0.02 * factor
        for group in adamw.param_groups:
            group["lr"] = 1e-2 * factor
        for each in (model, reference):
            give_gradients(each, seed=step)
        for p, parts in parts_of.items():
            for part, gradient in zip(parts, p.grad.chunk(len(parts)), strict=True):
                part.grad = gradient
        optimizer.step()
        muon.step()
        adamw.step()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0, msg=name)


def test_newton_schulz_maps_singular_values_near_1():
    """Compared with the quintic in float64, and with its author's range of singular values."""
    matrices = torch.randn(3, 24, 64, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    values = values / values.norm(dim=-1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert values.min() > 0.5 and values.max() < 1.3
    expected = left @ torch.diag_embed(values) @ right
    for found, wanted in ((newton_schulz(matrices), expected), (newton_schulz(matrices.mT).mT, expected)):
        assert (found.double() - wanted).norm() < 0.02 * wanted.norm()


def test_newton_schulz_in_float16_keeps_the_direction_of_small_gradients(monkeypatch):
    matrices = torch.randn(1, 48, 16, generator=torch.Generator().manual_seed(0)) * 3e-8
    expected = newton_schulz(matrices).double()
    monkeypatch.setattr("training.optim.half_precision", lambda device_type: "fp16")
    found = newton_schulz(matrices)
    assert found.dtype == torch.float16
    assert torch.cosine_similarity(found.double().flatten(), expected.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("optim", [OptimConfig(lr=1e-2), MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("bad_step", [0, 2])
def test_nonfinite_step_changes_nothing(optim, bad_step):
    """Parameters, moments and step counts equal those of a run without the step bit by bit."""
    model, undisturbed = small_model(), small_model()
    optimizer, other = (wrap(build_optimizer(each, optim)) for each in (model, undisturbed))
    for step in range(4):
        give_gradients(model, seed=step)
        if step == bad_step:
            model.transformer.h[0].mlp.c_fc.weight.grad[0, 0] = float("nan")
        step_if_finite(optimizer, torch.tensor(step != bad_step))
        if step != bad_step:
            give_gradients(undisturbed, seed=step)
            step_if_finite(other, torch.tensor(True))
    for p, q in zip(model.parameters(), undisturbed.parameters(), strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == other.state[q].keys()
        for key, value in other.state[q].items():
            assert torch.equal(optimizer.state[p][key], value), key


def test_muon_state_is_saved_and_loaded():
    one_process = SimpleNamespace(is_main_process=True, distributed_type=None)
    model = small_model()
    optimizer = wrap(build_optimizer(model, MUON))
    give_gradients(model, seed=0)
    optimizer.step()
    parameters, moments = full_state_dict(model, optimizer, one_process, copy=True)
    assert {key.partition(".")[0] for key in moments} == {"momentum_buffer", "step", "exp_avg", "exp_avg_sq"}
    again = deepcopy(model)
    of_again = wrap(build_optimizer(again, MUON))
    load_moments(moments, again, of_again)
    for each, its_optimizer in ((model, optimizer), (again, of_again)):
        give_gradients(each, seed=1)
        its_optimizer.step()
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q) and not torch.equal(p, parameters[name])
    with pytest.raises(ValueError, match="no fitting moments of AdamW"):
        load_moments(moments, again, wrap(build_optimizer(again, OptimConfig())))


def test_weight_decay_on_matrices_and_embeddings_only():
    model = GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=2, n_head=2, n_embd=16, n_positions=8))
    optimizer = build_optimizer(model, OptimConfig())
    name_of = {p: name for name, p in model.named_parameters()}
    decayed, free = ({name_of[p] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert decayed | free == set(name_of.values())
    assert not decayed & free
    assert all(name.endswith(".weight") and ".ln_" not in name for name in decayed)
    assert all(name.endswith(".bias") or ".ln_" in name for name in free)
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= decayed
    assert optimizer.defaults["fused"]
