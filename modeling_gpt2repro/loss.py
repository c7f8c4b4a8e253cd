"""Cross-entropy of the language-model head, computed without ever holding all the logits."""

import torch
from torch.nn import functional as F

# Rows of logits in memory at a time, in the compute dtype: enough to fill the machine's matmul units.
CHUNK_ROWS = {"cpu": 1024}
DEFAULT_CHUNK_ROWS = 8192
# Rows of them in float32 at a time. On a CPU few, so that the passes of a softmax stay in cache and the
# allocator hands the same pages out again (above 32 MB glibc returns them to the kernel each time).
BLOCK_ROWS = {"cpu": 8}
# Tensor cores want dimensions in multiples of 64 (nanoGPT's 50,304). Padding lives only inside this matmul.
VOCAB_MULTIPLE = 64


def linear_cross_entropy(hidden, weight, targets, num_items=None, ignore_index=-100):
    """
    Mean cross-entropy of `softmax(hidden @ weight.T)` against `targets`.

    A [B*T, V] float32 tensor of logits would be the largest thing in a training step (124M at 64 x 1024:
    13 GB). Here a chunk of rows at a time becomes logits, its share of the loss, and, while the logits are
    at hand, its share of the gradients; nothing of size [N, V] survives the chunk.

    Args:
        hidden: [N, D] last hidden states, any float dtype.
        weight: [V, D] head matrix.
        targets: [N] int64 token ids; rows with `ignore_index` count for nothing.
        num_items: what the summed loss is divided by (an int or a scalar tensor); the number of rows that
            are not ignored when None. Gradient accumulation passes the count of the whole global batch.

    Returns:
        scalar float32 tensor.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        compute_dtype = torch.get_autocast_dtype(hidden.device.type)
    else:
        compute_dtype = hidden.dtype
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss_sum = _LinearCrossEntropySum.apply(hidden, weight, targets, ignore_index, compute_dtype, needs_gradient)
    if num_items is None:
        num_items = (targets != ignore_index).sum()
    elif torch.is_tensor(num_items):
        num_items = num_items.to(loss_sum.device)
    return loss_sum / num_items


class _LinearCrossEntropySum(torch.autograd.Function):
    """The sum over rows; both gradients are made in the forward pass and scaled in the backward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, ignore_index, compute_dtype, needs_gradient):
        num_rows, vocab_size = hidden.shape[0], weight.shape[0]
        device_type = hidden.device.type
        chunk_rows = min(num_rows, CHUNK_ROWS.get(device_type, DEFAULT_CHUNK_ROWS))
        block_rows = BLOCK_ROWS.get(device_type, chunk_rows)

        # One cast (and pad) of the matrix for all chunks.
        weight_c = weight.to(compute_dtype)
        if hidden.is_cuda:
            weight_c = F.pad(weight_c, (0, 0, 0, -vocab_size % VOCAB_MULTIPLE))
        hidden_c = hidden.to(compute_dtype)
        valid = targets != ignore_index
        safe_targets = targets.masked_fill(~valid, 0)

        loss_sum = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_gradient else None
        grad_weight = None
        # Autocast would cast again, and at each chunk; the dtypes here are already chosen.
        with torch.autocast(device_type, enabled=False):
            buffer = hidden_c.new_empty(chunk_rows, weight_c.shape[0])
            for start in range(0, num_rows, chunk_rows):
                rows = slice(start, min(start + chunk_rows, num_rows))
                logits = torch.mm(hidden_c[rows], weight_c.T, out=buffer[: rows.stop - start])  # [C, V]
                logits = logits[:, :vocab_size]
                for block, target, keep in zip(
                    logits.split(block_rows),
                    safe_targets[rows, None].split(block_rows),
                    valid[rows, None].split(block_rows),
                    strict=True,
                ):
                    p = block.float()
                    target_logit = p.gather(1, target)
                    row_max = p.amax(dim=-1, keepdim=True)
                    p = p.sub_(row_max).exp_()
                    row_sum = p.sum(dim=-1, keepdim=True)
                    loss_sum += ((row_sum.log() + row_max - target_logit) * keep).sum()
                    if needs_gradient:
                        # d loss / d logits = softmax - onehot, zero on ignored rows; in the logits' place.
                        target_p = p.gather(1, target) / row_sum
                        block.copy_(p.mul_(keep / row_sum))
                        block.scatter_(1, target, ((target_p - 1) * keep).to(block.dtype))
                if needs_gradient:
                    grad_hidden[rows] = (logits @ weight_c[:vocab_size]).to(hidden.dtype)
                    of_chunk = (logits.T @ hidden_c[rows]).float()
                    grad_weight = of_chunk if grad_weight is None else grad_weight.add_(of_chunk)
        if needs_gradient:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return loss_sum

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        # Not in place: a second backward through a retained graph must find them unscaled.
        return grad_hidden * grad_loss, grad_weight * grad_loss, None, None, None, None
