"""Cross-entropy of the language-model head, computed in chunks without the full logits."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100
# Sizes by device type: "cpu", and None for all others. benchmarks/LOG.md has the measurements.
# Rows (tokens) of logits that exist at once: enough to keep the matmul units busy.
CHUNK_ROWS = {"cpu": 512, None: 8192}
# Rows of a chunk that are converted to float32 at once (None: all). On a CPU, few rows stay in its cache.
SOFTMAX_ROWS = {"cpu": 8, None: None}
# Rows of the weight gradient that are computed at once (None: all). On a CPU they stay in cache until they are added,
# and glibc would return buffers above 32 MB to the kernel each time, which costs page faults.
GRADIENT_ROWS = {"cpu": 2048, None: None}
# Matmuls are faster if rows start at multiples of 128 bytes (nanoGPT pads the vocabulary to 50,304). On a GPU the
# dimensions of the matmul must be multiples too, so the matrix is padded with rows of zeros. On a CPU it is enough
# to align the rows of the logits. The padding is not visible outside this file.
VOCAB_MULTIPLE = 64
PAD_MATRIX = {"cpu": False, None: True}


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, num_items: int | Tensor | None = None
) -> Tensor:
    """Compute the mean cross-entropy of `softmax(hidden @ weight.T)` and `targets`.

    The [N, V] logits in float32 would be the largest tensor of a training step (13 GB for 64 x 1024 tokens). This
    function computes the logits of one chunk of rows, adds the loss and both gradients of the chunk, and overwrites
    the logits with the next chunk.

    Args:
        hidden: Last hidden states, [N, D].
        weight: Matrix of the head, [V, D].
        targets: Token ids, [N] int64. Rows with -100 are left out.
        num_items: Divisor of the summed loss, a number or a scalar tensor. The default is the number of rows that are
            not left out. Gradient accumulation passes the count of the global batch.

    Returns:
        The loss, a scalar in float32 (float64 for float64 inputs).
    """
    if torch.is_autocast_enabled(hidden.device.type):
        compute_dtype = torch.get_autocast_dtype(hidden.device.type)
    else:
        compute_dtype = hidden.dtype
    if num_items is None:
        num_items = (targets != IGNORE_INDEX).sum()
    # The scale stays on the device: reading its value would make the host wait.
    sum_dtype = torch.promote_types(compute_dtype, torch.float32)
    scale = torch.ones((), dtype=sum_dtype, device=hidden.device) / num_items
    needs_grad = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight)]
    return _LinearCrossEntropy.apply(hidden, weight, targets, scale, compute_dtype, *needs_grad)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the losses of all rows times `scale`. The forward pass computes the gradients too."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *arguments: Any) -> Tensor:
        # torch.compile fuses the softmax on a GPU, but makes it slower on a CPU (benchmarks/LOG.md).
        use_op = hidden.device.type == "cpu" and torch.compiler.is_compiling()
        compute = _loss_and_gradients_op if use_op else _loss_and_gradients
        loss, grad_hidden, grad_weight = compute(hidden, *arguments)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # The factor is usually 1, and then a CPU need not copy the gradients. On a GPU the check itself would sync.
        if torch.compiler.is_compiling() or grad_loss.device.type != "cpu" or grad_loss != 1:
            # Not in place: a second backward pass through a retained graph needs the unscaled gradients.
            grad_hidden, grad_weight = grad_hidden * grad_loss, grad_weight * grad_loss
        needs_grad_hidden, needs_grad_weight, *others = ctx.needs_input_grad
        return (
            grad_hidden if needs_grad_hidden else None,
            grad_weight if needs_grad_weight else None,
            *(None for _ in others),
        )


def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor,
    compute_dtype: torch.dtype,
    needs_grad_hidden: bool,
    needs_grad_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and the gradients of `hidden` and `weight`, which are empty tensors if not needed."""
    num_rows, vocab_size = hidden.shape[0], weight.shape[0]
    device_type = hidden.device.type
    size_key = device_type if device_type in CHUNK_ROWS else None
    chunk_rows = min(num_rows, CHUNK_ROWS[size_key])
    compiling = torch.compiler.is_compiling()
    # Cast and pad the matrix once for all chunks.
    padding = -vocab_size % VOCAB_MULTIPLE
    hidden_c, weight_c = hidden.to(compute_dtype), weight.to(compute_dtype)
    if PAD_MATRIX[size_key]:
        weight_c = F.pad(weight_c, (0, 0, 0, padding))
    # The compiler would unroll the loop over blocks, and plans the memory itself.
    gradient_rows = len(weight_c) if compiling else GRADIENT_ROWS[size_key] or len(weight_c)
    valid = targets != IGNORE_INDEX
    safe_targets = targets.masked_fill(~valid, 0)

    sum_dtype = scale.dtype
    loss_sum = torch.zeros_like(scale)
    grad_hidden = torch.empty_like(hidden) if needs_grad_hidden else hidden.new_empty(0)
    grad_weight = torch.empty_like(weight_c, dtype=sum_dtype) if needs_grad_weight else weight.new_empty(0)
    # float16 ends at 65,504, and the gradient of a frequent token, summed over a chunk, could be larger.
    shrink = 2.0**-6 if compute_dtype == torch.float16 else 1.0
    # The dtypes are already chosen, and autocast would cast again for each chunk.
    with torch.autocast(device_type, enabled=False):
        if not compiling:
            buffer = hidden_c.new_empty(chunk_rows, vocab_size + padding)
            buffer[:, vocab_size:] = 0  # some bfloat16 kernels read past the end of an odd row, and 0 * NaN is NaN
            buffer = buffer[:, : len(weight_c)]
        for start in range(0, num_rows, chunk_rows):
            rows = slice(start, min(start + chunk_rows, num_rows))
            chunk, target, is_valid = hidden_c[rows], safe_targets[rows, None], valid[rows, None]
            # `grad_logits` is [C, V], or [C, V + padding] on a GPU.
            if compiling:
                # Depend on the chunk before: else Inductor makes the logits of all chunks first. An integer 0 would be
                # removed by Inductor of torch 2.11.
                if start > 0:
                    chunk = chunk + (0.0 * loss_sum).to(compute_dtype)
                logits = torch.mm(chunk, weight_c.T)
                grad_logits, target_log_p = _softmax_gradient_to_compile(
                    logits, target, is_valid, vocab_size, sum_dtype
                )
                inputs = chunk
            else:
                grad_logits = buffer[: rows.stop - start]
                if PAD_MATRIX[size_key]:  # on a GPU, float32 logits save the pass that converts them
                    logits = _mm(chunk, weight_c.T, sum_dtype)
                else:
                    logits = torch.mm(chunk, weight_c.T, out=grad_logits)
                out = grad_logits[:, :vocab_size] if needs_grad_hidden or needs_grad_weight else None
                block_rows = SOFTMAX_ROWS[size_key] or chunk_rows
                target_log_p = _softmax_gradient(logits[:, :vocab_size], target, block_rows, out)
                # Rows that are left out become 0 below, where there is less to multiply than in `grad_logits`.
                inputs = chunk * is_valid
            loss_sum = loss_sum - (target_log_p * is_valid).sum()
            # Scale after the matmuls: small gradients would underflow in float16 before them.
            if needs_grad_hidden:
                grad_hidden[rows] = _mm(grad_logits, weight_c, sum_dtype) * (scale * is_valid)
            if needs_grad_weight:
                inputs = inputs if shrink == 1 else inputs * shrink
                for some in (slice(first, first + gradient_rows) for first in range(0, len(weight_c), gradient_rows)):
                    gradient = _mm(grad_logits[:, some].T, inputs, sum_dtype)
                    if start == 0:
                        grad_weight[some] = gradient.mul_(scale / shrink)
                    else:
                        grad_weight[some].addcmul_(gradient, scale / shrink)
    return loss_sum * scale, grad_hidden, grad_weight[:vocab_size].to(weight.dtype)


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply two matrices. The result has `dtype`, theirs or a wider one."""
    # One kernel where there is one: NVIDIA's GPUs, for bfloat16 from Ampere on. Inductor of torch 2.10 lacks it.
    can_widen = a.is_cuda and a.dtype != dtype and torch.version.hip is None and not torch.compiler.is_compiling()
    if can_widen and (a.dtype == torch.float16 or torch.cuda.get_device_capability(a.device) >= (8, 0)):
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def _softmax_gradient(logits: Tensor, target: Tensor, block_rows: int, out: Tensor | None) -> Tensor:
    """Write softmax - onehot into `out` if it is given, block by block. Return the targets' log-probabilities.

    Args:
        logits: [C, V] in the compute dtype, and then may be `out` itself, or in the dtype of the sums.
        target: [C, 1].
        block_rows: rows of a block.
        out: [C, V] in the compute dtype; None if no gradient is needed.

    Returns:
        [C, 1] in the dtype of the sums.
    """
    sum_dtype = torch.promote_types(logits.dtype, torch.float32)
    target_log_ps = []
    for first in range(0, len(logits), block_rows):
        rows = slice(first, first + block_rows)
        log_p = torch.log_softmax(logits[rows], dim=-1, dtype=sum_dtype)
        target_log_p = log_p.gather(1, target[rows])
        target_log_ps.append(target_log_p)
        at_target = target_log_p.expm1()
        if out is not None and out.is_cuda:  # exp converts in the same kernel
            torch.exp(log_p, out=out[rows]).scatter_(1, target[rows], at_target.to(out.dtype))
        elif out is not None:
            out[rows].copy_(log_p.exp_().scatter_(1, target[rows], at_target))
    return torch.cat(target_log_ps)


def _softmax_gradient_to_compile(
    logits: Tensor, target: Tensor, is_valid: Tensor, vocab_size: int, sum_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute the same so that Inductor makes one kernel of it, which reads the logits twice and overwrites them.

    It wants comparisons in place of gather and scatter, the padding included, and maximum and sum in this form, which
    it computes in one pass ("online softmax").

    Args:
        logits: [C, V + padding].
        target: [C, 1].
        is_valid: [C, 1] bool. Other rows have a gradient of 0.

    Returns:
        softmax - onehot, [C, V + padding] in the dtype of the logits; and the targets' log-probabilities [C, 1].
    """
    columns = torch.arange(logits.shape[1], device=logits.device)
    wide = logits.to(sum_dtype).masked_fill(columns >= vocab_size, -torch.inf)
    maximum = wide.amax(-1, keepdim=True)
    log_sum = maximum + (wide - maximum).exp().sum(-1, keepdim=True).log()
    is_target = columns == target
    target_log_p = wide.masked_fill(~is_target, 0).sum(-1, keepdim=True) - log_sum
    gradient = torch.where(is_target, target_log_p.expm1(), (wide - log_sum).exp())
    return logits.copy_(gradient * is_valid), target_log_p


# torch reads the schema of the operator from the type hints of the function.
_loss_and_gradients_op = torch.library.custom_op(
    "gpt2repro::linear_cross_entropy", _loss_and_gradients, mutates_args=()
)


@_loss_and_gradients_op.register_fake
def _shapes_of_loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, dtype: torch.dtype, *needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    needs_grad_hidden, needs_grad_weight = needs_grad
    return (
        torch.empty_like(scale),
        torch.empty_like(hidden) if needs_grad_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if needs_grad_weight else weight.new_empty(0),
    )


class LogitsNotComputed:
    """Placeholder for `outputs.logits` in training with labels. Used as a tensor, it raises an error with the remedy.

    With None, the error would be "'NoneType' object is not subscriptable". The placeholder has none of the attributes
    of a tensor, so accelerate, DDP and torch.compile leave it unchanged.
    """

    MESSAGE = (
        "logits are not computed in training with labels, because they would be the largest tensor of the step. To get "
        "them, set model.config.logits_in_training = True, call model(..., return_logits=True), or omit the labels"
    )

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self.MESSAGE} (outputs.logits.{name})")

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(cls.MESSAGE)

    def _refuse(self, *args: Any) -> Any:
        raise TypeError(self.MESSAGE)

    __getitem__ = __iter__ = __len__ = __bool__ = __float__ = __neg__ = __array__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __matmul__ = __pow__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = _refuse


LOGITS_NOT_COMPUTED = LogitsNotComputed()
