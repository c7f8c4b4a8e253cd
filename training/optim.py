"""The learning rate, AdamW as GPT-3 used it, Muon for the blocks' matrices, and steps that are skipped."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object

from modeling_gpt2repro import GPT2ReproForCausalLM
from training.config import OptimConfig
from training.machine import half_precision
from training.sharding import full_tensor, shard_like

# Devices whose fused AdamW supports `found_inf`, which skips a step.
_FOUND_INF = ("cpu", "cuda")

# Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/: a quintic that maps singular values to about 1.
_COEFFICIENTS, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5
_MOMENTUM = 0.95
# Elements that are orthogonalized at a time: enough to fill a GPU, and a small part of its memory.
_BATCH_NUMEL = 2**26

Window = TypeVar("Window")


def learning_rate(step: int, optim: OptimConfig, max_steps: int) -> float:
    """Return the learning rate of a step, a pure function of the step.

    Linear warm-up, then a cosine down to `final_lr_fraction` of the peak (GPT-3 paper, appendix B; the lecture's). With
    `cooldown_fraction`, the rate stays at its peak and falls linearly over that last part of the steps (Hägele et al.
    2024, https://arxiv.org/abs/2405.18392).

    Args:
        step: optimizer steps already taken: 0 for the first step, whose rate is lr / warmup_steps.
        max_steps: end of the schedule, from which on the rate is the lowest.
    """
    peak, warmup_steps, final_fraction = optim.lr, optim.warmup_steps, optim.final_lr_fraction
    if step >= max_steps:
        return peak * final_fraction
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    if optim.cooldown_fraction is not None:
        decay = min(1.0, (max_steps - step) / (optim.cooldown_fraction * max_steps))
    elif step < warmup_steps:
        decay = 1.0
    else:
        progress = (step - warmup_steps) / (max_steps - warmup_steps)
        decay = 0.5 * (1.0 + math.cos(math.pi * progress))  # 1 -> 0
    # The minimum, since the warm-up of a short run may reach into its cooldown.
    return peak * min(warmup, final_fraction + (1.0 - final_fraction) * decay)


def build_optimizer(model: GPT2ReproForCausalLM, optim: OptimConfig) -> torch.optim.Optimizer:
    """Build AdamW over all parameters or, with `optim.muon_lr`, Muon over the blocks' matrices and AdamW over the rest.

    Weight decay applies to matrices and embeddings, not to biases and LayerNorms.

    Returns:
        torch.optim.AdamW with two groups, the one with decay first; or a MuonAdamW with two groups of Muon's before
        them. Each group has "lr_ratio", its learning rate over `optim.lr`.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    muon_params: list[torch.Tensor] = []
    if optim.muon_lr is not None:
        muon_params = [p for p in model.transformer.h.parameters() if p.dim() == 2 and p.requires_grad]
    in_muon = set(muon_params)
    matrices = [p for p in parameters if p.dim() >= 2 and p not in in_muon]
    groups = [
        {"params": matrices, "weight_decay": optim.weight_decay, "lr_ratio": 1.0},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "lr_ratio": 1.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    if optim.muon_lr is None:
        return adamw
    qkv_params = {p for name, p in model.named_parameters() if name.endswith("c_attn.weight")}  # Q, K and V in one
    muon = {"lr": optim.muon_lr, "weight_decay": optim.muon_weight_decay, "lr_ratio": optim.muon_lr / optim.lr}
    muon_groups = [
        {"params": [p for p in muon_params if p in qkv_params], "num_splits": 3, **muon},
        {"params": [p for p in muon_params if p not in qkv_params], "num_splits": 1, **muon},
    ]
    return MuonAdamW(muon_groups, adamw)


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW as one optimizer.

    Muon computes the update of torch.optim.Muon, with these differences for training a language model:

    - The rows of a matrix are split into "num_splits" matrices, which are orthogonalized separately: c_attn into Q, K
      and V.
    - Matrices of the same shape are orthogonalized together, in a few large kernels.
    - FSDP2's shards of a matrix are gathered once.
    - As in fused AdamW, a step changes nothing if the scalar tensor `found_inf` is 1. The host does not wait for it.

    Args:
        muon_groups: parameter groups of matrices, with "lr", "weight_decay" and "num_splits".
    """

    def __init__(self, muon_groups: list[dict[str, Any]], adamw: torch.optim.AdamW) -> None:
        self._adamw = adamw
        super().__init__([{**group, "momentum": _MOMENTUM} for group in muon_groups] + adamw.param_groups, defaults={})
        self._link_adamw()

    def _link_adamw(self) -> None:
        """Let AdamW use this optimizer's state and those of its groups that are AdamW's."""
        self._adamw.param_groups = [group for group in self.param_groups if "betas" in group]
        self._adamw.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._link_adamw()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures are not supported
        """Update all parameters, unless `found_inf` is set to 1."""
        found_inf = getattr(self, "found_inf", None)
        self._adamw.found_inf = found_inf  # type: ignore[attr-defined]  # read by fused AdamW
        self._adamw.step()
        skip = None if found_inf is None else found_inf.bool()
        for group in self.param_groups:
            if "betas" in group:
                continue
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, parameters in by_shape.items():
                batch_size = max(1, _BATCH_NUMEL // shape.numel())
                for first in range(0, len(parameters), batch_size):
                    self._muon_step(parameters[first : first + batch_size], group, skip)

    def _muon_step(self, parameters: list[torch.Tensor], group: dict[str, Any], skip: torch.Tensor | None) -> None:
        """Update matrices of the same shape.

        Args:
            parameters: [rows, columns] each.
            skip: scalar bool tensor that is true if nothing may change; None to update.
        """

        def assign(tensor: torch.Tensor, new: torch.Tensor) -> None:
            tensor.copy_(new if skip is None else torch.where(skip, tensor, new))

        directions = []
        for p in parameters:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            assert p.grad is not None
            momentum = state["momentum_buffer"].lerp(p.grad, 1 - group["momentum"])
            direction = p.grad.lerp(momentum, group["momentum"])  # Nesterov
            directions.append(full_tensor(direction))
            assign(state["momentum_buffer"], momentum)
        rows, columns = parameters[0].shape
        num_splits = group["num_splits"]
        matrices = torch.stack(directions).view(-1, rows // num_splits, columns)
        updates = newton_schulz(matrices).reshape(-1, rows, columns)
        # Makes the effect of a step on the output independent of the shape.
        lr = group["lr"] * math.sqrt(max(1, rows / num_splits / columns))
        for p, update in zip(parameters, updates, strict=True):
            decayed = p * (1 - group["lr"] * group["weight_decay"])
            assign(p, decayed.add_(shard_like(p, update), alpha=-lr))


def newton_schulz(matrices: torch.Tensor) -> torch.Tensor:
    """Orthogonalize matrices approximately, by the Newton-Schulz iteration.

    Args:
        matrices: [N, rows, columns].

    Returns:
        bfloat16 (float16 on a GPU without it) [N, rows, columns], with singular values between about 0.7 and 1.2.
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    is_fp16 = half_precision(x.device.type) == "fp16"  # divide first then: small gradients are below its range
    x = x if is_fp16 else x.bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # bounds the singular values
    x = x.half() if is_fp16 else x
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def clip_gradients(accelerator: Accelerator, model: torch.nn.Module, max_norm: float) -> torch.Tensor:
    """Scale the gradients down to a global norm of `max_norm`. Every process must call this.

    Returns:
        scalar float32 tensor on the device, the norm before clipping.
    """
    norm = full_tensor(accelerator.clip_grad_norm_(model.parameters(), max_norm))
    return norm.to(device=accelerator.device, dtype=torch.float32)


def step_if_finite(
    optimizer: AcceleratedOptimizer, is_finite: torch.Tensor, scaler: torch.amp.GradScaler | None = None
) -> torch.Tensor:
    """Take the optimizer's step if the loss and the gradient are finite; otherwise change nothing.

    On CUDA the optimizer decides on the device, and the host does not wait. With fp16, adapt the loss scale too: after
    `clip_gradients`, the gradient has its own scale again, and is not finite if the scaled one was too large. (The
    scaler's own step would make the host wait, and does not know the loss.)

    Args:
        is_finite: scalar bool tensor on the device, the same on every process.
        scaler: of the Accelerator, for fp16.

    Returns:
        scalar float32 tensor on the device, the loss scale from now on; 1 without fp16.
    """
    inner = optimizer.optimizer
    if is_finite.device.type in _FOUND_INF:
        inner.found_inf = is_finite.logical_not().float()
        inner.step()
    elif is_finite.item():
        inner.step()
    scale = torch.ones((), device=is_finite.device)
    if scaler is not None:
        scaler.update()
        scale = scaler.scale(scale)
    return scale


def windows_with_nonfinite_loss(losses: list[torch.Tensor], windows: Sequence[Window]) -> list[Window]:
    """Return all processes' windows of the micro-batches whose loss is not finite. Every process must call this.

    If all losses are finite (and the gradient is not), return all windows.

    Args:
        losses: scalar tensors, one per micro-batch of this process.
        windows: descriptions of this process's windows, in the order of the micro-batches.
    """
    rows = len(windows) // len(losses)
    is_nonfinite = torch.stack(losses).isfinite().logical_not().repeat_interleave(rows).tolist()
    found = [window for window, bad in zip(windows, is_nonfinite, strict=True) if bad]
    return gather_object(found) or gather_object([*windows])
