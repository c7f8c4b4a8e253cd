"""Estimate a run before its first step: hardware, FLOPs, memory, time and cost."""

import os
import platform
import re
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate import Accelerator

from common.cli import say
from modeling_gpt2repro.loss import CHUNK_ROWS

if TYPE_CHECKING:
    from modeling_gpt2repro import GPT2ReproConfig
    from training.config import BatchConfig

# FLOPs per token of GPT-2 124M at T = 1024, as Plan.flops_per_token counts them.
FLOPS_PER_TOKEN_124M = 855_166_464
# On-demand list prices of large GPU clouds per device, rounded. The setting for the price of a device overrides them.
PRICES_DATE = "late 2026"
DOLLARS_PER_HOUR = {
    "B200": 5.00,
    "H200": 3.50,
    "H100 PCIe": 2.50,
    "H100": 3.00,
    "A100": 1.80,
    "MI300X": 2.50,
    "L40S": 1.00,
    "A10G": 0.75,
    "L4": 0.70,
    "RTX 5090": 0.70,
    "RTX 4090": 0.40,
    "RTX 3090": 0.25,
}

# Bytes of a process without a model: Python, torch and transformers (CPU), the CUDA context and cuBLAS (GPU).
_BASE_BYTES = {"cpu": 0.6e9, None: 0.8e9}
# Fragmentation of glibc's heap by (device, bytes per activation), fitted to runs (benchmarks/memory.py).
_FRAGMENTATION: dict[tuple[str | None, int], float] = {("cpu", 2): 1.25, ("cpu", 4): 1.55}
_DROPOUT_BYTES = 22  # per attention weight: 12, and fragmentation
# Muennighoff et al. 2023, "Scaling Data-Constrained Language Models": up to 4 epochs are nearly as good as new data.
_MAX_USEFUL_EPOCHS = 4


class Device(NamedTuple):
    """Speed of a device."""

    tflops: float
    """dense bfloat16 matmul of the data sheet, 10^12 FLOP/s, without sparsity"""
    tokens_per_s: float | None = None
    """of GPT-2 124M by llm.c, per device, with eight of them (T = 1024, 524,288 tokens per step)"""
    source: str = ""
    """of tokens_per_s"""


# By words in torch's name of the device; the first that fits counts. Data sheets: nvidia.com, amd.com.
DEVICES = {
    "B200": Device(2250),
    "H200": Device(989, 463_000, "estimated: llm.c's rate on an H100, which has the same peak and less bandwidth"),
    "H100 PCIe": Device(756),
    "H100": Device(989, 463_000, "estimated from llm.c's published 140 ms per step on eight (vislog)"),
    "A100": Device(312, 221_000, "estimated from llm.c's published 94 minutes for 10B tokens on eight"),
    "MI300X": Device(1307),
    "L40S": Device(362),
    "A10G": Device(70),
    "L4": Device(121),
    "RTX 5090": Device(209),
    "RTX 4090": Device(165),
    "RTX 3090": Device(71),
}


class Hardware(NamedTuple):
    """Hardware of a run."""

    device: torch.device
    name: str
    num_processes: int
    local_world_size: int
    """processes on this machine"""
    mixed_precision: str
    """ "no" or "bf16" """
    peak_flops: float
    """FLOP/s of one device"""
    peak_source: str
    """ "data sheet" or "measured matmul" """
    dollars_per_hour: float | None
    """of one device; None if unknown"""

    def describe(self) -> str:
        """Return the console's line."""
        threads = f", {torch.get_num_threads()} threads each" if self.device.type == "cpu" else ""
        return (
            f"hardware  {self.num_processes} x {self.name}{threads}, mixed precision {self.mixed_precision}, peak "
            f"{self.peak_flops / 1e12:,.3g} TFLOP/s each ({self.peak_source})"
        )


def find_hardware(accelerator: Accelerator, dollars_per_hour: float | None = None) -> Hardware:
    """Find out what the run's hardware is.

    Args:
        dollars_per_hour: price of one device, in place of the table's.
    """
    device, mixed_precision = accelerator.device, accelerator.mixed_precision
    name = device_name(device)
    peak, source = peak_flops(device, torch.float32 if mixed_precision == "no" else torch.bfloat16)
    return Hardware(
        device=device,
        name=name,
        num_processes=accelerator.num_processes,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        mixed_precision=mixed_precision,
        peak_flops=peak,
        peak_source=source,
        dollars_per_hour=dollars_per_hour or DOLLARS_PER_HOUR.get(find_device(name) or ""),
    )


def device_name(device: torch.device) -> str:
    """Return "NVIDIA H200", "Apple GPU", or the processor's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    return f"{device.type} ({platform.processor() or platform.machine()})"


def find_device(name: str) -> str | None:
    """Return the key in DEVICES of a name such as "NVIDIA H200"; None for parts and slower kinds of a device too."""
    if re.search(r"MIG|Laptop|Max-Q|NVL|GH200| D$", name):
        return None
    return next((key for key in DEVICES if re.search(rf"\b{key}\b", name)), None)


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return (peak FLOP/s, "data sheet" or "measured matmul").

    The peak is measured if the device is not in the table, and in float32, whose peak depends on settings (TF32).
    """
    key = find_device(device_name(device))
    if key is not None and dtype == torch.bfloat16:
        return DEVICES[key].tflops * 1e12, "data sheet"
    return measure_matmul_flops(device, dtype), "measured matmul"


def measure_matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Return the best FLOP/s of a square matmul during a time long enough for a busy core to become free."""
    size = 2048 if device.type == "cpu" else 8192
    generator = torch.Generator(device).manual_seed(0)  # leaves the run's random state alone
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)

    def synchronize() -> None:
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()

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
    """saved by the forward pass for the backward pass"""
    head: float
    """logits of a chunk and the gradient of the head's matrix"""
    base: float
    """the process without a model"""

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return sum(self)


@dataclass(kw_only=True, frozen=True)
class Plan:
    """Arithmetic, memory, time and cost of a run."""

    shape: "GPT2ReproConfig"
    batch: "BatchConfig"
    max_steps: int
    hardware: Hardware

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
        """Estimate the memory of a process at the peak of a training step, without sharding (FSDP2).

        It is this project's model: an MLP keeps its input and the GELU's, attention does not keep its T x T weights
        (except with dropout on a CPU), and logits are made in chunks. benchmarks/RECORDS.md compares it with runs.

        Args:
            micro_batch_size: sequences in one forward pass of one process.
        """
        num_parameters, num_processes = self.num_parameters, self.hardware.num_processes
        n_layer, n_head, n_embd = self.shape.n_layer, self.shape.n_head, self.shape.n_embd
        rows = micro_batch_size * self.batch.seq_len
        width = 2 if self.hardware.mixed_precision == "bf16" else 4  # bytes of the compute dtype
        kind = "cpu" if self.hardware.device.type == "cpu" else None
        # Per block and token: two residual inputs in float32; in the compute dtype, the inputs of c_attn (D), attention
        # (3 D), c_proj (D), c_fc (D) and the GELU (4 D).
        block = 8 * n_embd + 10 * width * n_embd + 4 * n_head
        if self.shape.resid_pdrop:
            block += 2 * n_embd  # two masks, one byte each
        # Last LayerNorm and loss: input, output, its copy in the compute dtype, its gradient.
        ends = (12 + width) * n_embd
        # The block whose backward pass runs: gradients inside the MLP and of the residual stream.
        backward = 8 * width * n_embd + 8 * n_embd
        activations: float = rows * (n_layer * block + ends + backward)
        casts = width * num_parameters if width == 2 else 0  # matrices in bfloat16, cast once per forward pass
        activations = (activations + casts) * _FRAGMENTATION.get((kind, width), 1)
        if self.shape.attn_pdrop and kind == "cpu":  # no fused kernel: T x T weights three times, float32
            activations += rows * n_layer * n_head * self.batch.seq_len * _DROPOUT_BYTES
        vocab_size = self.shape.vocab_size
        head_rows = min(rows, CHUNK_ROWS[kind])
        head = 4 * vocab_size * n_embd + head_rows * vocab_size * (width if kind == "cpu" else width + 4)
        buckets = 4 * num_parameters if num_processes > 1 else 0  # DDP's
        gradients: float = 4 * num_parameters
        # With several micro-batches, one's gradients exist while the next one's activations are needed. With a single
        # one, gradients grow as activations are freed, or live in the buckets.
        if rows * num_processes == self.batch.tokens_per_step:
            gradients = max(0, gradients - activations) if num_processes == 1 else 0
        return MemoryEstimate(
            state=12 * num_parameters,
            gradients=gradients + buckets,
            activations=activations,
            head=head,
            base=_BASE_BYTES[kind],
        )

    def describe(self) -> str:
        """Return the console's lines about the model, the run and the hardware."""
        shape, flops = self.shape, self.flops_per_token
        return (
            f"model     {self.num_parameters:,} parameters: {shape.n_layer} layers, {shape.n_embd} wide, "
            f"{shape.n_head} heads, {flops / 1e9:.3f} GFLOP per token\n"
            f"plan      {self.max_steps:,} steps, {self.total_tokens:,} tokens, {self.total_tokens * flops:.2e} FLOP\n"
            f"{self.hardware.describe()}"
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

    def describe_rental(self) -> str:
        """Return time and cost on rented GPUs, one and eight, with the source of each rate.

        The rate is GPT-2 124M's, scaled by the FLOPs per token; larger models come a little closer to the peak.
        """
        lines = []
        for name in ("A100", "H100", "H200"):
            device, price = DEVICES[name], DOLLARS_PER_HOUR[name]
            assert device.tokens_per_s is not None
            rate = device.tokens_per_s * FLOPS_PER_TOKEN_124M / self.flops_per_token
            hours = self.total_tokens / rate / 3600
            lines.append(
                f"on        {name:<5} {format_duration(3600 * hours)} on one, {format_duration(3600 * hours / 8)} on "
                f"eight, ${hours * price:,.2f} at ${price:.2f} per hour (list price, {PRICES_DATE}; {rate:,.0f} "
                f"tokens/s each, {device.source})"
            )
        return "\n".join(lines)


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
