"""Muon on the blocks' matrices and AdamW on the rest, as one optimizer."""

import math
from collections import defaultdict

import torch

from training.state import gathered, held_like

# Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/: a quintic that takes singular values to about 1.
_COEFFICIENTS, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5
_MOMENTUM = 0.95
# Numbers that are orthogonalised at a time: enough to fill a GPU, and a small part of its memory.
_BATCH_NUMEL = 2**26


class MuonAdamW(torch.optim.Optimizer):
    """
    Muon as torch.optim.Muon computes it, but for what a language model's training wants of it:

    - The rows of a matrix in a group with "parts" are that many matrices, each orthogonalised by itself: c_attn's are
      Q, K and V.
    - Matrices of one shape are orthogonalised together, in a few large kernels.
    - Of shards (FSDP2's DTensors) each matrix is gathered once.
    - Like fused AdamW it changes nothing in a step for which `found_inf`, a scalar tensor, has been set to 1; and no
      host waits for it.
    """

    def __init__(self, muon_groups, adamw):
        """
        Args:
            muon_groups: parameter groups of matrices, with "lr", "weight_decay" and "parts".
            adamw: torch.optim.AdamW over the other parameters.
        """
        self._adamw = adamw
        super().__init__([{**group, "momentum": _MOMENTUM} for group in muon_groups] + adamw.param_groups, defaults={})
        self._share()

    def _share(self):
        """AdamW has its groups of this one's, and this one's state."""
        self._adamw.param_groups = [group for group in self.param_groups if "betas" in group]
        self._adamw.state = self.state

    def __setstate__(self, state):
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure=None):
        found_inf = getattr(self, "found_inf", None)
        self._adamw.found_inf = found_inf
        self._adamw.step()
        is_bad = None if found_inf is None else found_inf.bool()
        for group in self.param_groups:
            if "betas" in group:
                continue
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, parameters in by_shape.items():
                at_a_time = max(1, _BATCH_NUMEL // shape.numel())
                for first in range(0, len(parameters), at_a_time):
                    self._step(parameters[first : first + at_a_time], group, is_bad)

    def _step(self, parameters, group, is_bad):
        """
        Args:
            parameters: [rows, columns] each.
            is_bad: scalar bool tensor, or None: the step is to be taken.
        """

        def change(tensor, new):
            tensor.copy_(new if is_bad is None else torch.where(is_bad, tensor, new))

        directions = []
        for p in parameters:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            momentum = state["momentum_buffer"].lerp(p.grad, 1 - group["momentum"])
            direction = p.grad.lerp(momentum, group["momentum"])  # Nesterov's
            directions.append(gathered(direction))
            change(state["momentum_buffer"], momentum)
        rows, columns = parameters[0].shape
        matrices = torch.stack(directions).view(-1, rows // group["parts"], columns)
        updates = orthogonalized(matrices).reshape(-1, rows, columns)
        # So that the size of a step's effect on the output does not depend on the shape.
        lr = group["lr"] * math.sqrt(max(1, rows / group["parts"] / columns))
        for p, update in zip(parameters, updates, strict=True):
            decayed = p * (1 - group["lr"] * group["weight_decay"])
            change(p, decayed.add_(held_like(p, update), alpha=-lr))


def orthogonalized(matrices):
    """
    The Newton-Schulz iteration towards the nearest matrices whose rows (or columns) are orthonormal.

    Args:
        matrices: [N, rows, columns].

    Returns:
        bfloat16, the same shape. Singular values come out between about 0.7 and 1.2.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16()
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # no singular value is larger than the norm
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
