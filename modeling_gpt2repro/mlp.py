"""GPT-2's MLP as one autograd function that keeps less for the backward pass."""

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def mlp(hidden, fc_weight, fc_bias, proj_weight, proj_bias):
    """
    `linear(gelu(linear(hidden)))`, with the tanh approximation of GELU.

    Autograd would keep the GELU's output, 4 D wide and with its input the largest activation of a block, and
    under autocast a second copy of both matrices. Here both are made again in the backward pass: at 124M and
    4 x 1024 tokens that is 0.4 of 4.2 GB, for 2% of the time on a CPU (benchmarks/LOG.md). A compiler decides such
    things itself, and does not need this.

    Args:
        hidden: [..., D].
        fc_weight, fc_bias: [4 D, D] and [4 D].
        proj_weight, proj_bias: [D, 4 D] and [D].

    Returns:
        [..., D], in autocast's dtype where that is on.
    """
    device_type = hidden.device.type
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else hidden.dtype
    return _MLP.apply(hidden.to(dtype), fc_weight, fc_bias, proj_weight, proj_bias)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, fc_weight, fc_bias, proj_weight, proj_bias):
        dtype = hidden.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            inner = F.linear(hidden, fc_weight.to(dtype), fc_bias.to(dtype))
            ctx.save_for_backward(hidden, inner, fc_weight, proj_weight)
            return F.linear(F.gelu(inner, approximate="tanh"), proj_weight.to(dtype), proj_bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        hidden, inner, fc_weight, proj_weight = ctx.saved_tensors
        of_hidden, *of_parameters = ctx.needs_input_grad
        grad_fc_weight = grad_fc_bias = grad_proj_weight = grad_proj_bias = grad_hidden = None
        rows = grad_output.flatten(0, -2)  # [N, D]
        if of_parameters[2]:
            activation = F.gelu(inner, approximate="tanh").flatten(0, -2)
            grad_proj_weight = (rows.T @ activation).to(proj_weight.dtype)
            del activation
        if of_parameters[3]:
            grad_proj_bias = rows.sum(0).to(proj_weight.dtype)
        grad_inner = grad_output @ proj_weight.to(hidden.dtype)
        torch.ops.aten.gelu_backward(grad_inner, inner, approximate="tanh", grad_input=grad_inner)  # in place
        grad_inner = grad_inner.flatten(0, -2)  # [N, 4 D]
        if of_parameters[0]:
            grad_fc_weight = (grad_inner.T @ hidden.flatten(0, -2)).to(fc_weight.dtype)
        if of_parameters[1]:
            grad_fc_bias = grad_inner.sum(0).to(fc_weight.dtype)
        if of_hidden:
            grad_hidden = (grad_inner @ fc_weight.to(hidden.dtype)).view_as(hidden)
        return grad_hidden, grad_fc_weight, grad_fc_bias, grad_proj_weight, grad_proj_bias
