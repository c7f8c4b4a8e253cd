"""Estimate a run before its first step: hardware, FLOPs, memory, time and cost."""

import os
import platform
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from common.cli import say
from modeling_gpt2repro import GPT2ReproConfig
from modeling_gpt2repro.loss import CHUNK_ROWS
from training.cards import CARDS, Card, card_of_device
from training.config import BatchConfig, Config

_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Bytes of a process without a model: Python, torch and transformers (CPU), the CUDA context and cuBLAS (GPU).
_BASE_BYTES = {"cpu": 0.6e9, None: 0.8e9}
# Fragmentation of glibc's heap by (device, bytes per activation), fitted to runs (benchmarks/memory.py).
_FRAGMENTATION: dict[tuple[str | None, int], float] = {("cpu", 2): 1.25, ("cpu", 4): 1.55}
# Fitted to torch's allocator with a stand-in for the CUDA driver, which computes nothing (benchmarks/RECORDS.md): bytes
# per logit of a chunk, and bytes per token, block and element of the width that a compiled step keeps in addition.
_GPU_LOGIT_BYTES = {"eager": 14, "compiled": 1.7}
_COMPILED_BYTES = 8.4
# Bytes per attention weight, of the T x T that are kept where no fused kernel is used: on a CPU with dropout (three of
# float32, and fragmentation), and on Apple's GPUs, for which torch 2.13 has no fused backward pass (one of float32).
_CPU_DROPOUT_BYTES, _MPS_BYTES = 22, 4
# Muennighoff et al. 2023, "Scaling Data-Constrained Language Models": up to 4 epochs are nearly as good as new data.
_MAX_USEFUL_EPOCHS = 4


class Hardware(NamedTuple):
    """Hardware of a run."""

    device: torch.device
    name: str
    num_processes: int
    local_world_size: int
    """processes on this machine"""
    mixed_precision: str
    """ "no", "bf16" or "fp16" """
    peak_flops: float
    """FLOP/s of one device"""
    peak_source: str
    """ "data sheet" or "measured matmul" """
    dollars_per_hour: float | None
    """of one device; None if unknown"""
    card: Card | None = None
    """card that a dry run is for, in place of the device here"""


def find_hardware(
    accelerator: Accelerator, dollars_per_hour: float | None = None, card_name: str | None = None
) -> Hardware:
    """Find out what the run's hardware is. The peak of a device that is not in the table is measured.

    Args:
        dollars_per_hour: price of one device, in place of the table's.
        card_name: card that a dry run is for, in place of the device here.
    """
    if card_name is not None:
        return card_hardware(CARDS[card_name], accelerator.num_processes, dollars_per_hour)
    device, mixed_precision = accelerator.device, accelerator.mixed_precision
    name = f"{device.type} ({platform.processor() or platform.machine()})"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "mps":
        name = "Apple GPU"
    card = card_of_device(name)
    is_known = card is not None and mixed_precision != "no"  # the peak in float32 depends on settings (TF32)
    peak = card.tflops * 1e12 if card and is_known else measure_matmul_flops(device, _DTYPES[mixed_precision])
    return Hardware(
        device=device,
        name=name,
        num_processes=accelerator.num_processes,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        mixed_precision=mixed_precision,
        peak_flops=peak,
        peak_source="data sheet" if is_known else "measured matmul",
        dollars_per_hour=dollars_per_hour or (card and card.dollars_per_hour),
    )


def card_hardware(card: Card, num_processes: int = 1, dollars_per_hour: float | None = None) -> Hardware:
    """Return the hardware of a card that need not be here."""
    return Hardware(
        device=torch.device("cuda"),
        name=card.name,
        num_processes=num_processes,
        local_world_size=num_processes,
        mixed_precision=card.mixed_precision,
        peak_flops=card.tflops * 1e12,
        peak_source="data sheet",
        dollars_per_hour=dollars_per_hour or card.dollars_per_hour,
        card=card,
    )


def measure_matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Return the best FLOP/s of a square matmul during a time long enough for a busy core to become free."""
    size = 2048 if device.type == "cpu" else 8192
    generator = torch.Generator(device).manual_seed(0)  # leaves the run's random state alone
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    synchronize = torch.get_device_module(device).synchronize  # on a CPU it does nothing
    torch.mm(a, b, out=out)
    synchronize()
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        before = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronize()
        best = min(best, time.perf_counter() - before)
    if device.type != "cpu":
        del a, b, out
        torch.get_device_module(device).empty_cache()  # cached memory does not count as free
    return 2 * size**3 / best


class MemoryEstimate(NamedTuple):
    """Bytes per process at the peak of a training step."""

    state: float
    """parameters and AdamW's two moments (Muon has one), float32"""
    gradients: float
    """float32, and DDP's buckets if there are several processes"""
    activations: float
    """saved by the blocks' forward pass for the backward pass; on a CPU, also everything else that the two passes
    allocate, except the logits"""
    head: float
    """logits of a chunk, the matrix's gradient, last LayerNorm; on a GPU, a block's backward pass if that is more"""
    base: float
    """the process without a model"""

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return sum(self)


@dataclass(kw_only=True, frozen=True)
class Plan:
    """Arithmetic, memory, time and cost of a run."""

    shape: GPT2ReproConfig
    batch: BatchConfig
    max_steps: int
    hardware: Hardware
    compiled: bool = False
    has_positions: bool = False
    """batches have position_ids, because documents are kept apart"""
    activation_checkpointing: bool = False
    """blocks are computed again in the backward pass, and keep only their inputs"""
    sharded: bool = False
    """FSDP2: each process has a part of the parameters, of their gradients and of the optimizer's moments"""

    @property
    def num_parameters(self) -> int:
        """Parameters of the model. The token embedding, which is also the head's matrix, counts once."""
        width = self.shape.n_embd
        block = 12 * width**2 + 13 * width  # c_attn 3, c_proj 1, MLP 4 + 4; biases 3 + 1 + 4 + 1, LayerNorms 4
        return (self.shape.vocab_size + self.shape.n_positions) * width + self.shape.n_layer * block + 2 * width

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs per token (PaLM paper, appendix B).

        6 per parameter (forward 2, backward 4), and attention's two T x T matmuls. Position embeddings are looked up,
        not multiplied.
        """
        num_multiplied = self.num_parameters - self.shape.n_positions * self.shape.n_embd
        return 6 * num_multiplied + 12 * self.shape.n_layer * self.shape.n_embd * self.batch.seq_len

    @property
    def total_tokens(self) -> int:
        """Training tokens over all steps and processes."""
        return self.max_steps * self.batch.tokens_per_step

    def estimate_memory(self, micro_batch_size: int) -> MemoryEstimate:
        """Estimate the memory of a process at the peak of a training step.

        It is this project's model: an MLP keeps its input and the GELU's, attention does not keep its T x T weights
        (except with dropout on a CPU, and on Apple's GPUs), and logits are made in chunks. benchmarks/RECORDS.md
        compares it with runs.
        """
        num_parameters, num_processes = self.num_parameters, self.hardware.num_processes
        num_shards = num_processes if self.sharded else 1
        rows = micro_batch_size * self.batch.seq_len
        kind = "cpu" if self.hardware.device.type == "cpu" else None
        activations, ends, backward = self._activation_bytes(rows, kind)
        if kind == "cpu":  # freed memory stays in the heap
            activations, ends, backward = activations + ends + backward, 0, 0
        # The head's loss: logits of a chunk, and the matrix's gradient.
        width = _DTYPES[self.hardware.mixed_precision].itemsize
        per_logit = width if kind == "cpu" else _GPU_LOGIT_BYTES["compiled" if self.compiled else "eager"]
        vocab_size = self.shape.vocab_size
        head = 4 * vocab_size * self.shape.n_embd + min(rows, CHUNK_ROWS[kind]) * vocab_size * per_logit
        buckets = 4 * num_parameters if num_processes > 1 and not self.sharded else 0  # DDP's
        gradients: float = 4 * num_parameters
        # With several micro-batches, one's gradients exist while the next one's activations are needed. With a single
        # one, gradients grow as activations are freed, or live in the buckets.
        # FSDP2 shards a gradient only when it is exchanged, after the last micro-batch.
        if rows * num_processes == self.batch.tokens_per_step:
            if num_processes == 1:
                gradients = max(0, gradients - activations)
            else:
                gradients = gradients / num_shards if self.sharded else 0
        return MemoryEstimate(
            state=12 * num_parameters / num_shards,
            gradients=gradients + buckets,
            activations=activations,
            # The head's memory is free again when the blocks' backward pass begins.
            head=max(ends + head, backward),
            base=_BASE_BYTES[kind],
        )

    def _activation_bytes(self, rows: int, kind: str | None) -> tuple[float, float, float]:
        """Return the bytes for `rows` tokens.

        Returns:
            (saved by the blocks' forward pass, around the head, of the block whose backward pass runs)
        """
        n_layer, n_head, n_embd = self.shape.n_layer, self.shape.n_head, self.shape.n_embd
        width = _DTYPES[self.hardware.mixed_precision].itemsize
        # Per block and token: two inputs from the residual stream; in the compute dtype, the inputs of c_attn (D),
        # attention (3 D), c_proj (D), c_fc (D) and the GELU (4 D).
        residual = width if self.shape.residual_in_autocast_dtype else 4
        block: float = 2 * residual * n_embd + 10 * width * n_embd + 4 * n_head
        if self.compiled and kind != "cpu":  # what Inductor chooses to keep
            block += _COMPILED_BYTES * n_embd
        if self.shape.resid_pdrop:
            block += 2 * n_embd  # two masks, one byte each
        # Last LayerNorm and loss: input, output, its copy in the compute dtype, its gradient.
        ends = (12 + width) * n_embd
        # Gradients inside the MLP and of the residual stream.
        backward: float = 8 * width * n_embd + 8 * n_embd
        saved: float = n_layer * block
        if self.activation_checkpointing:  # a block's input; the block is computed again
            saved, backward = n_layer * residual * n_embd, backward + block
        casts = width * self.num_parameters if width == 2 else 0  # the matrices, cast once per forward pass
        factor = _FRAGMENTATION.get((kind, width), 1)
        activations: float = (rows * saved + casts) * factor
        per_weight = _MPS_BYTES if self.hardware.device.type == "mps" else 0
        if self.shape.attn_pdrop and kind == "cpu":
            per_weight = _CPU_DROPOUT_BYTES
        weights = rows * n_head * self.batch.seq_len * per_weight
        activations += weights * (1 if self.activation_checkpointing else n_layer)
        return activations, rows * ends * factor, rows * backward * factor

    def describe(self) -> str:
        """Return the console's lines about the model, the run and the hardware."""
        shape, flops, hardware = self.shape, self.flops_per_token, self.hardware
        count = torch.get_num_threads()
        threads = f", {count} thread{'s'[: count > 1]} each" if hardware.device.type == "cpu" else ""
        return (
            f"model     {self.num_parameters:,} parameters: {shape.n_layer} layers, {shape.n_embd} wide, "
            f"{shape.n_head} heads, {flops / 1e9:.3f} GFLOP per token\n"
            f"plan      {self.max_steps:,} steps, {self.total_tokens:,} tokens, {self.total_tokens * flops:.2e} FLOP\n"
            f"hardware  {hardware.num_processes} x {hardware.name}{threads}, mixed precision "
            f"{hardware.mixed_precision}, peak {hardware.peak_flops / 1e12:,.3g} TFLOP/s each ({hardware.peak_source})"
        )

    def describe_batch(self, micro_batch_size: int, accumulation: int) -> str:
        """Return the console's lines about the batch, as an equation, and about the memory it takes."""
        memory = self.estimate_memory(micro_batch_size)
        parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in memory._asdict().items())
        return (
            f"batch     {micro_batch_size} sequences x {self.batch.seq_len} tokens x {accumulation} accumulated x "
            f"{self.hardware.num_processes} process(es) = {self.batch.tokens_per_step:,} tokens per step\n"
            f"memory    about {memory.total / 1e9:.2f} GB per process: {parts}"
        )


def make_plan(config: Config, shape: GPT2ReproConfig, accelerator: Accelerator) -> Plan:
    """Return the plan of a run's settings, for the hardware here or for `config.card`."""
    return Plan(
        shape=shape,
        batch=config.batch,
        max_steps=config.max_steps,
        hardware=find_hardware(accelerator, config.dollars_per_hour, config.card),
        compiled=config.compile,
        has_positions=config.data.boundary == "document",
        activation_checkpointing=config.activation_checkpointing == "block",
        sharded=accelerator.distributed_type == DistributedType.FSDP,
    )


def format_duration(seconds: float) -> str:
    """Return 3725 as "1:02:05", days as "2 days, 1:02:05", and from a century on years."""
    years = seconds / (365.25 * 24 * 3600)
    return f"{years:,.0f} years" if years >= 100 else str(timedelta(seconds=round(seconds)))


def warn_of_repetition(folder: str, epochs: float) -> None:
    """Print a warning if a folder's data is repeated more often than repetition helps."""
    if round(epochs) > _MAX_USEFUL_EPOCHS:
        say(
            f"warning: each training token of {folder} is seen {epochs:,.1f} times; after about {_MAX_USEFUL_EPOCHS}, "
            "repeating teaches less and less (arXiv 2305.16264): prepare more text, lower max_steps (or its weight in "
            "data.mix), or raise model.dropout"
        )
