"""The chunked loss of the head, compared with plain cross-entropy."""

import pytest
import torch
from torch.nn import functional as F

from modeling_gpt2repro import loss as loss_module
from modeling_gpt2repro.loss import linear_cross_entropy


@pytest.fixture(params=[(1, 1, False), (7, 3, True), (64, 16, False), (1000, None, True)])
def chunks(request, monkeypatch):
    """Set chunk and block sizes that do or do not divide the 50 rows, with and without the padding for GPUs."""
    monkeypatch.setattr(loss_module, "PAD_MATRIX", {"cpu": request.param[2]})
    monkeypatch.setattr(loss_module, "CHUNK_ROWS", {"cpu": request.param[0]})
    monkeypatch.setattr(loss_module, "SOFTMAX_ROWS", {"cpu": request.param[1]})
    monkeypatch.setattr(loss_module, "GRADIENT_ROWS", {"cpu": request.param[0] + 12})


def problem(dtype=torch.float64, ignored=True):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 16, generator=generator, dtype=dtype)
    weight = torch.randn(101, 16, generator=generator, dtype=dtype)
    targets = torch.randint(0, 101, (50,), generator=generator)
    if ignored:
        targets[::3] = -100
    return hidden, weight, targets


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_loss_and_gradients_equal_plain_cross_entropy_in_float64(chunks, dtype, tolerance):
    hidden, weight, targets = problem()
    reference = [t.clone().requires_grad_() for t in (hidden, weight)]
    expected = F.cross_entropy(reference[0] @ reference[1].T, targets)
    expected.backward()
    inputs = [t.to(dtype, copy=True).requires_grad_() for t in (hidden, weight)]
    loss = linear_cross_entropy(*inputs, targets)
    loss.backward()
    for actual, exact in zip((loss, *(t.grad for t in inputs)), (expected, *(t.grad for t in reference)), strict=True):
        assert actual.dtype is dtype
        assert (actual.double() - exact).norm() / exact.norm() < tolerance


def test_num_items_scales_loss_and_gradients(chunks):
    hidden, weight, targets = problem(torch.float32, ignored=False)
    gradients = []
    for num_items in (None, 50, 200, torch.tensor(200)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = linear_cross_entropy(h, w, targets, num_items=num_items)
        (3 * loss).backward()
        gradients.append((loss.item(), h.grad, w.grad))
    for scaled, factor in zip(gradients[1:], (1, 4, 4), strict=True):
        for actual, expected in zip(scaled, gradients[0], strict=True):
            torch.testing.assert_close(actual * factor, expected)


def test_second_backward_adds_the_same_gradients():
    hidden, weight, targets = problem(torch.float32)
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * once)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_matches_plain_autocast(dtype):
    hidden, weight, targets = problem(torch.float32)
    results = []
    for plain in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy((h @ w.T).float(), targets) if plain else linear_cross_entropy(h, w, targets)
        loss.backward()
        assert h.grad.dtype == w.grad.dtype == torch.float32
        results.append((loss, h.grad, w.grad))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
    for actual, reference in zip(results[1][1:], results[0][1:], strict=True):
        assert (actual - reference).norm() / reference.norm() < 0.01  # bf16 has 8 bits


def test_large_sums_of_gradients_fit_float16():
    """One token is the target of all rows, and its gradient, summed over them, is above float16's 65,504."""
    hidden, weight = torch.full((800, 4), 100.0), torch.zeros(64, 4)
    targets = torch.full((800,), 7)
    weight.requires_grad_()
    with torch.autocast("cpu", torch.float16):
        linear_cross_entropy(hidden, weight, targets, num_items=1).backward()
    torch.testing.assert_close(weight.grad[7], torch.full((4,), -800 * 100 * 63 / 64), rtol=1e-3, atol=0)


def test_uninitialized_memory_is_never_read(monkeypatch):
    """torch fills new memory with NaN in this mode. With 101 columns, the buffer of the logits has padding."""
    hidden, weight, targets = problem(torch.float32)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            h, w = (t.to(dtype, copy=True).requires_grad_() for t in (hidden, weight))
            linear_cross_entropy(h, w, targets).backward()
            assert torch.isfinite(h.grad).all()
            assert torch.isfinite(w.grad).all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_loss_is_correct_under_no_grad():
    hidden, weight, targets = problem(torch.float32)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden.requires_grad_(), weight, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(hidden.detach() @ weight.T, targets))


def test_extreme_logits_stay_finite():
    hidden, weight, targets = problem(torch.float32)
    hidden = (1000 * hidden).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, targets))
    assert torch.isfinite(hidden.grad).all()


def test_all_rows_ignored_is_nan_like_torch():
    hidden, weight, targets = problem(torch.float32)
    targets[:] = -100
    assert torch.isnan(linear_cross_entropy(hidden, weight, targets))
