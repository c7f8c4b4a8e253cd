"""Cross-entropy of the language-model head, computed without ever holding all the logits."""

import torch
from torch import Tensor
from torch.nn import functional as F

# Sizes by device type: "cpu", and None for every other. benchmarks/LOG.md has the measurements.
# Rows (tokens) of logits in memory at a time, in the compute dtype: enough to fill the matmul units.
CHUNK_ROWS = {"cpu": 512, None: 8192}
# Rows of a chunk in float32 at a time. On a CPU few, so that the passes of the softmax stay in its cache.
BLOCK_ROWS = {"cpu": 8, None: None}
# Rows of the matrix's gradient at a time. On a CPU a slab stays in cache until it is added up, and above 32 MB
# glibc would return its pages to the kernel and fault them in again each time.
SLAB_ROWS = {"cpu": 2048, None: None}
# Matmul units want rows that start at multiples of 128 bytes (nanoGPT pads the vocabulary to 50,304 for it).
# The padding lives and dies in here. A GPU wants the matmul's own dimensions to be multiples too, so there the
# matrix gets rows of zeros; on a CPU it is enough that each row of logits starts at a multiple.
VOCAB_MULTIPLE = 64
PAD_MATRIX = {"cpu": False, None: True}


def linear_cross_entropy(hidden, weight, targets, num_items=None, ignore_index=-100):
    """
    Mean cross-entropy of `softmax(hidden @ weight.T)` against `targets`.

    A [N, V] float32 tensor of logits would be the largest thing in a training step (124M at 64 x 1024:
    13 GB). Here a chunk of rows at a time becomes logits, its share of the loss, and, while the logits are
    at hand, its share of the gradients; nothing of size [N, V] survives the chunk.

    Args:
        hidden: [N, D] last hidden states, any float dtype.
        weight: [V, D] head matrix.
        targets: [N] int64 token ids; rows with `ignore_index` count for nothing.
        num_items: what the summed loss is divided by (an int or a scalar tensor); the number of rows that
            are not ignored when None. Gradient accumulation passes the count of the whole global batch.

    Returns:
        scalar float32 tensor (float64 for float64 inputs).
    """
    if torch.is_autocast_enabled(hidden.device.type):
        compute_dtype = torch.get_autocast_dtype(hidden.device.type)
    else:
        compute_dtype = hidden.dtype
    if num_items is None:
        num_items = (targets != ignore_index).sum()
    # A tensor on the device: reading it as a number would make the host wait for the device.
    sum_dtype = torch.promote_types(compute_dtype, torch.float32)
    scale = torch.ones((), dtype=sum_dtype, device=hidden.device) / num_items
    gradients_of = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight)]
    return _LinearCrossEntropy.apply(hidden, weight, targets, scale, ignore_index, compute_dtype, *gradients_of)


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum over rows times `scale`; both gradients are made in the forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, scale, ignore_index, compute_dtype, of_hidden, of_weight):
        # A compiler fuses the passes of a GPU's softmax; on a CPU it makes them slower (benchmarks/LOG.md).
        compute = _opaque_to_compilers if hidden.device.type == "cpu" and torch.compiler.is_compiling() else _compute
        loss, grad_hidden, grad_weight = compute(
            hidden, weight, targets, scale, ignore_index, compute_dtype, of_hidden, of_weight
        )
        ctx.of_hidden, ctx.of_weight = of_hidden, of_weight
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        # As a rule the factor is 1. To look would stop a GPU's queue; on a CPU it saves copying the gradients.
        if torch.compiler.is_compiling() or grad_loss.device.type != "cpu" or grad_loss != 1:
            # Not in place: a second backward through a retained graph must find them unscaled.
            grad_hidden, grad_weight = grad_hidden * grad_loss, grad_weight * grad_loss
        return (
            grad_hidden if ctx.of_hidden else None,
            grad_weight if ctx.of_weight else None,
            *(None,) * 6,
        )


def _compute(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor,
    ignore_index: int,
    compute_dtype: torch.dtype,
    of_hidden: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and its gradients (of no elements where not asked for)."""
    num_rows, vocab_size = hidden.shape[0], weight.shape[0]
    device_type = hidden.device.type
    sizes = device_type if device_type in CHUNK_ROWS else None
    chunk_rows = min(num_rows, CHUNK_ROWS[sizes])
    compiling = torch.compiler.is_compiling()
    if compiling:  # a compiler fuses the passes and plans the memory itself, and would unroll the loops
        block_rows, slab_rows = chunk_rows, vocab_size
    else:
        block_rows, slab_rows = BLOCK_ROWS[sizes] or chunk_rows, SLAB_ROWS[sizes] or vocab_size

    # One cast (and pad) of the matrix for all chunks.
    padding = -vocab_size % VOCAB_MULTIPLE
    hidden_c, weight_c = hidden.to(compute_dtype), weight.to(compute_dtype)
    if PAD_MATRIX[sizes]:
        weight_c = F.pad(weight_c, (0, 0, 0, padding))
    valid = targets != ignore_index
    safe_targets = targets.masked_fill(~valid, 0)

    sum_dtype = scale.dtype
    loss_sum = torch.zeros_like(scale)
    grad_hidden = torch.empty_like(hidden) if of_hidden else hidden.new_empty(0)
    grad_weight = torch.empty_like(weight, dtype=sum_dtype) if of_weight else weight.new_empty(0)
    # Autocast would cast again, and at each chunk; the dtypes here are already chosen.
    with torch.autocast(device_type, enabled=False):
        if not compiling:
            buffer = hidden_c.new_empty(chunk_rows, vocab_size + padding)
            buffer[:, vocab_size:] = 0  # bfloat16 kernels that work in pairs read past an odd row, and 0 * NaN is NaN
            buffer = buffer[:, : weight_c.shape[0]]
        for start in range(0, num_rows, chunk_rows):
            rows = slice(start, min(start + chunk_rows, num_rows))
            out = None if compiling else buffer[: rows.stop - start]
            padded = torch.mm(hidden_c[rows], weight_c.T, out=out)  # [C, V, and padding on a GPU]
            logits = padded[:, :vocab_size]
            for block, target, keep in zip(
                logits.split(block_rows),
                safe_targets[rows, None].split(block_rows),
                valid[rows, None].split(block_rows),
                strict=True,
            ):
                log_p = torch.log_softmax(block, dim=-1, dtype=sum_dtype)
                target_log_p = log_p.gather(1, target)
                loss_sum -= (target_log_p * keep).sum()
                if of_hidden or of_weight:
                    # d loss / d logits = softmax - onehot, zero on ignored rows; in the logits' place.
                    block.copy_(log_p.exp_().scatter_(1, target, target_log_p.expm1()).mul_(keep))
            # The scale goes on after the matmuls: before, float16 would lose small gradients.
            if of_hidden:
                grad_hidden[rows] = torch.mm(padded, weight_c).to(sum_dtype) * scale
            if of_weight:
                for first in range(0, vocab_size, slab_rows):
                    slab = slice(first, min(first + slab_rows, vocab_size))
                    of_slab = torch.mm(logits[:, slab].T, hidden_c[rows]).to(sum_dtype)
                    if start == 0:
                        grad_weight[slab] = of_slab.mul_(scale)
                    else:
                        grad_weight[slab].addcmul_(of_slab, scale)
    return loss_sum * scale, grad_hidden, grad_weight.to(weight.dtype)


# The type hints above are the operator's signature.
_opaque_to_compilers = torch.library.custom_op("gpt2repro::linear_cross_entropy", _compute, mutates_args=())


@_opaque_to_compilers.register_fake
def _shapes(hidden, weight, targets, scale, ignore_index, compute_dtype, of_hidden, of_weight):
    return (
        torch.empty_like(scale),
        torch.empty_like(hidden) if of_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if of_weight else weight.new_empty(0),
    )
