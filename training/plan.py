"""What a run will take: arithmetic, memory, time and money. All of it is known before the first step."""

from datetime import timedelta
from typing import NamedTuple

from training.hardware import DEVICES, FLOPS_PER_TOKEN_124M, PLANNED

# A process before it has a model: Python, torch and transformers (CPU), the CUDA context and cuBLAS (GPU).
_BASE_BYTES = {"cpu": 0.6e9, None: 0.8e9}
# On a CPU, glibc's heap has holes: fitted to the peak resident memory of runs (benchmarks/memory.py).
_HEAP_HOLES = {("cpu", 2): 1.25, ("cpu", 4): 1.55}
_DROPOUT_BYTES = 22  # 12 and the heap's holes
# Rows of logits that the loss head holds at a time (modeling_gpt2repro/loss.py).
_HEAD_ROWS = {"cpu": 512, None: 8192}

# Muennighoff et al. 2023, "Scaling Data-Constrained Language Models": up to 4 epochs are nearly as good as new data.
_EPOCHS_WORTH = 4


class MemoryEstimate(NamedTuple):
    """Bytes a process needs at its peak, by what for."""

    state: float
    """parameters and AdamW's two moments (Muon has one), float32"""
    gradients: float
    """float32, and DDP's buckets where there are several processes"""
    activations: float
    """what the backward pass needs of the forward pass"""
    head: float
    """logits of a chunk and the gradient of the head's matrix"""
    base: float
    """the process before it has a model"""

    @property
    def total(self):
        return sum(self)


class Plan:
    """What a run will take. All of it is known before the first step."""

    def __init__(self, shape, num_parameters, config, hardware):
        """
        Args:
            shape: has vocab_size, n_layer, n_head, n_embd and n_positions; a GPT2ReproConfig.
            num_parameters: of the model, tied matrices counted once.
            config: training.config.Config.
            hardware: training.hardware.Hardware.
        """
        self.shape, self.num_parameters, self.hardware = shape, num_parameters, hardware
        self.batch, self.max_steps, self.dropout = config.batch, config.max_steps, config.model.dropout

    @property
    def flops_per_token(self):
        """
        6 FLOPs a parameter and token (forward 2, backward 4), and attention's two T x T matmuls (PaLM paper,
        appendix B). Position embeddings are looked up, not multiplied.
        """
        shape = self.shape
        multiplied = self.num_parameters - shape.n_positions * shape.n_embd
        return 6 * multiplied + 12 * shape.n_layer * shape.n_embd * self.batch.seq_len

    @property
    def total_tokens(self):
        """Tokens trained on, over all steps and processes."""
        return self.max_steps * self.batch.tokens_per_step

    def memory(self, micro_batch_size):
        """
        The peak of a training step, with this project's model: MLPs keep their input and the GELU's, attention does not
        keep its T x T weights (but with dropout on a CPU), logits are made in chunks.

        Args:
            micro_batch_size: sequences in one forward pass of one process.

        Returns:
            MemoryEstimate. Checked on a CPU against runs (benchmarks/RECORDS.md); sharding (FSDP, ZeRO) is not in it.
        """
        num_parameters, num_processes = self.num_parameters, self.hardware.num_processes
        n_layer, n_head, n_embd = self.shape.n_layer, self.shape.n_head, self.shape.n_embd
        rows = micro_batch_size * self.batch.seq_len
        width = 2 if self.hardware.mixed_precision == "bf16" else 4
        kind = self.hardware.device.type if self.hardware.device.type in _HEAD_ROWS else None
        # A block keeps for a token: its two residual inputs in float32; and in the compute type the inputs of c_attn
        # (D), attention (3 D) and c_proj (D), of c_fc (D) and of the GELU (4 D).
        of_block = 8 * n_embd + 10 * width * n_embd + 4 * n_head
        if self.dropout:
            of_block += 2 * n_embd  # two masks, a byte each
        # Last LayerNorm and loss: input, output, its copy in the compute type, its gradient.
        of_ends = (12 + width) * n_embd
        # The block that runs backward: gradients of the MLP's inside and of the residual stream.
        of_backward = 8 * width * n_embd + 8 * n_embd
        activations = rows * (n_layer * of_block + of_ends + of_backward)
        casts = width * num_parameters if width == 2 else 0  # matrices in bfloat16, once a forward pass
        activations = (activations + casts) * _HEAP_HOLES.get((kind, width), 1)
        if self.dropout and kind == "cpu":  # its attention kernel knows no dropout: T x T weights three times, float32
            activations += rows * n_layer * n_head * self.batch.seq_len * _DROPOUT_BYTES
        matrix = self.shape.vocab_size * n_embd
        head_rows = min(rows, _HEAD_ROWS[kind])
        head = 4 * matrix + head_rows * self.shape.vocab_size * (width if kind == "cpu" else width + 4)
        buckets = 4 * num_parameters if num_processes > 1 else 0  # DDP's
        gradients = 4 * num_parameters
        # The gradients of one micro-batch are there while the next needs its activations; of a lone one they grow as
        # the activations go, or where there are buckets in these.
        if rows * num_processes == self.batch.tokens_per_step:
            gradients = max(0, gradients - activations) if num_processes == 1 else 0
        return MemoryEstimate(
            state=12 * num_parameters,
            gradients=gradients + buckets,
            activations=activations,
            head=head,
            base=_BASE_BYTES[kind],
        )

    def lines(self):
        """What is known of the model and the run, for the console."""
        shape, flops = self.shape, self.flops_per_token
        return [
            f"model     {self.num_parameters:,} parameters: {shape.n_layer} layers, {shape.n_embd} wide, "
            f"{shape.n_head} heads, {flops / 1e9:.3f} GFLOP a token",
            f"plan      {self.max_steps:,} steps, {self.total_tokens:,} tokens, {self.total_tokens * flops:.2e} FLOP",
            self.hardware.line(),
        ]

    def time_and_money(self):
        """
        Lines about what the run would take on rented GPUs, one and eight, each with where its rate comes from.

        The rate is that of GPT-2 124M, scaled by the FLOPs a token: larger models come a little nearer to the peak.
        """
        lines = []
        for name in PLANNED:
            device = DEVICES[name]
            rate = device.tokens_per_s * FLOPS_PER_TOKEN_124M / self.flops_per_token
            hours = self.total_tokens / rate / 3600
            lines.append(
                f"on        {name:<5} {duration(3600 * hours)} on one, {duration(3600 * hours / 8)} on eight, "
                f"${hours * device.dollars_an_hour:,.2f} at ${device.dollars_an_hour:.2f} an hour "
                f"({rate:,.0f} tokens/s each; {device.source})"
            )
        return lines

    def batch_lines(self, micro_batch_size, accumulation):
        """How an optimizer step is cut, as an equation, and the memory that takes."""
        needed = self.memory(micro_batch_size)
        return [
            f"batch     {micro_batch_size} sequences x {self.batch.seq_len} tokens x {accumulation} accumulated x "
            f"{self.hardware.num_processes} process(es) = {self.batch.tokens_per_step:,} tokens a step",
            f"memory    about {needed.total / 1e9:.2f} GB a process: "
            + ", ".join(f"{name} {value / 1e9:.2f}" for name, value in needed._asdict().items()),
        ]


def duration(seconds: float) -> str:
    """3725 -> "1:02:05"; days as "2 days, 1:02:05"; from a century on in years."""
    years = seconds / (365.25 * 24 * 3600)
    return f"{years:,.0f} years" if years >= 100 else str(timedelta(seconds=round(seconds)))


def repetition_warning(epochs: float) -> list[str]:
    """Return a warning's lines where the data is repeated more often than repetition teaches, else none."""
    if round(epochs) <= _EPOCHS_WORTH:
        return []
    return [
        f"warning: each training token is seen {epochs:,.1f} times; after about {_EPOCHS_WORTH}, repeating teaches "
        "less and less (arXiv 2305.16264): prepare more text, lower max_steps, or raise model.dropout"
    ]
