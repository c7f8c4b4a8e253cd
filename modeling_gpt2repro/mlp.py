"""GPT-2's MLP as one autograd function that saves fewer activations for the backward pass."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def recomputing_mlp(
    hidden: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor
) -> Tensor:
    """Compute `linear(gelu(linear(hidden)))` with the tanh approximation of GELU.

    Autograd would save the output of the GELU (4 D wide, one of the two largest activations of a block) and, under
    autocast, a cast copy of both matrices. This function computes them again in the backward pass. For 124M and
    4 x 1024 tokens, that saves 0.4 of 4.2 GB and costs 2% of the time on a CPU (benchmarks/LOG.md). torch.compile
    makes this trade itself. As in loss.py, second derivatives and torch.func are not supported.
    """
    device_type = hidden.device.type
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else hidden.dtype
    return _MLP.apply(hidden.to(dtype), fc_weight, fc_bias, proj_weight, proj_bias)


class _MLP(torch.autograd.Function):
    """Save the input and the output of the first linear layer, and compute the GELU again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor
    ) -> Tensor:
        dtype = hidden.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            inner = F.linear(hidden, fc_weight.to(dtype), fc_bias.to(dtype))
            ctx.save_for_backward(hidden, inner, fc_weight, proj_weight)
            return F.linear(F.gelu(inner, approximate="tanh"), proj_weight.to(dtype), proj_bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden, inner, fc_weight, proj_weight = ctx.saved_tensors
        needs_hidden, needs_fc_weight, needs_fc_bias, needs_proj_weight, needs_proj_bias = ctx.needs_input_grad
        grad_fc_weight = grad_fc_bias = grad_proj_weight = grad_proj_bias = grad_hidden = None
        rows = grad_output.flatten(0, -2)  # [N, D]
        if needs_proj_weight:
            activation = F.gelu(inner, approximate="tanh").flatten(0, -2)
            grad_proj_weight = (rows.T @ activation).to(proj_weight.dtype)
            del activation
        if needs_proj_bias:
            grad_proj_bias = rows.sum(0).to(proj_weight.dtype)
        grad_inner = grad_output @ proj_weight.to(hidden.dtype)
        torch.ops.aten.gelu_backward(grad_inner, inner, approximate="tanh", grad_input=grad_inner)  # in place
        grad_inner = grad_inner.flatten(0, -2)  # [N, 4 D]
        if needs_fc_weight:
            grad_fc_weight = (grad_inner.T @ hidden.flatten(0, -2)).to(fc_weight.dtype)
        if needs_fc_bias:
            grad_fc_bias = grad_inner.sum(0).to(fc_weight.dtype)
        if needs_hidden:
            grad_hidden = (grad_inner @ fc_weight.to(hidden.dtype)).view_as(hidden)
        return grad_hidden, grad_fc_weight, grad_fc_bias, grad_proj_weight, grad_proj_bias
