"""Split an optimizer step's batch into micro-batches; `micro_batch_size: auto` takes the largest that fits."""

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from common.cli import say
from training import TrainingError
from training.config import nearest_multiples
from training.estimate import Plan

if TYPE_CHECKING:
    from training.config import BatchConfig

# Share of the free memory that is left for evaluation, fragmentation and compiled code.
_RESERVED_SHARE = 0.1


def batch_arithmetic(batch: "BatchConfig", num_processes: int, largest: int | None = None) -> tuple[int, int]:
    """Split an optimizer step: micro-batch x seq_len x accumulation x processes = tokens per step, exactly.

    Args:
        num_processes: data-parallel processes.
        largest: for micro_batch_size "auto", the one of `micro_batch_sizes` that fits into memory.

    Returns:
        (micro_batch_size, accumulation)

    Raises:
        TrainingError: the batch does not divide. The message has the nearest values that do.
    """
    sizes = micro_batch_sizes(batch, num_processes)
    per_process = sizes[-1]
    wanted = (largest or per_process) if batch.micro_batch_size == "auto" else batch.micro_batch_size
    micro_batch_size = min(wanted, per_process)
    if per_process % micro_batch_size:
        below = max(n for n in sizes if n < micro_batch_size)
        above = min(n for n in sizes if n > micro_batch_size)
        raise TrainingError(
            f"batch.micro_batch_size={micro_batch_size} does not divide the {per_process} sequences per step "
            f"on each of {num_processes} process(es); nearest micro_batch_size: {below} or {above}"
        )
    return micro_batch_size, per_process // micro_batch_size


def micro_batch_sizes(batch: "BatchConfig", num_processes: int) -> list[int]:
    """Return the sizes that "auto" chooses from: the divisors of a process's sequences per step, [1, ..., all].

    Raises:
        TrainingError: the sequences cannot be divided among the processes. The message has the nearest values.
    """
    sequences = batch.tokens_per_step // batch.seq_len
    if sequences % num_processes:
        nearest = nearest_multiples(batch.tokens_per_step, batch.seq_len * num_processes)
        raise TrainingError(
            f"batch.tokens_per_step={batch.tokens_per_step} is {sequences} sequences of {batch.seq_len}, which "
            f"{num_processes} processes cannot share evenly; nearest tokens_per_step: {nearest}"
        )
    per_process = sequences // num_processes
    small = [n for n in range(1, math.isqrt(per_process) + 1) if per_process % n == 0]
    return sorted({*small, *(per_process // n for n in small)})


def choose_micro_batch_size(
    plan: Plan, accelerator: Accelerator, model: torch.nn.Module | None = None
) -> tuple[int, int]:
    """Return (micro_batch_size, accumulation), the same on every process. Every process must call this.

    Args:
        model: on its device, before it is wrapped; None to use the memory estimate alone.

    Raises:
        TrainingError: the batch does not divide.
    """
    batch, num_processes = plan.batch, plan.hardware.num_processes
    if batch.micro_batch_size != "auto":
        return batch_arithmetic(batch, num_processes)
    largest = largest_fitting_batch(
        micro_batch_sizes(batch, num_processes),
        estimate=lambda size: plan.estimate_memory(size).total,
        probe=None if model is None else lambda size: probe_memory(model, accelerator, size, batch.seq_len),
        device=accelerator.device,
        local_world_size=plan.hardware.local_world_size,
    )
    largest = int(accelerator.gather(torch.tensor([largest], device=accelerator.device)).min())
    return batch_arithmetic(batch, num_processes, largest)


def largest_fitting_batch(
    sizes: Sequence[int],
    *,
    estimate: Callable[[int], float],
    probe: Callable[[int], object] | None,
    device: torch.device,
    local_world_size: int,
) -> int:
    """Return the largest number of sequences that a process can train on at once.

    accelerate's find_executable_batch_size would try sizes that do not divide the batch, and has no estimate to start
    from.

    Args:
        sizes: candidates. If none fits, the smallest is returned, and the run itself fails.
        estimate: bytes that a size needs.
        probe: runs a training step of a size; None to use the estimate alone. A CPU does not report that its memory is
            exhausted, so the estimate decides there in any case.
        local_world_size: processes that share a CPU's memory.
    """
    free = free_memory(device) * (1 - _RESERVED_SHARE)
    sizes = sorted(sizes, reverse=True)
    if device.type == "cpu" or probe is None:
        num_sharing = local_world_size if device.type == "cpu" else 1
        return next((size for size in sizes if estimate(size) <= free / num_sharing), sizes[-1])
    for size in sizes:
        if estimate(size) > 1.5 * free:  # the estimate is better than that
            continue
        try:
            probe(size)
            return size
        except RuntimeError as error:  # torch.OutOfMemoryError is one; Apple's error is not of that class
            if "out of memory" not in str(error):
                raise
        torch.get_device_module(device).empty_cache()
    return sizes[-1]


def probe_memory(model: torch.nn.Module, accelerator: Accelerator, size: int, seq_len: int) -> None:
    """Run forward and backward passes on `size` sequences, without leaving gradients or optimizer state.

    Args:
        model: on its device, before it is wrapped.

    Raises:
        RuntimeError: the device's memory is exhausted.
    """
    num_parameters = sum(p.numel() for p in model.parameters())
    tokens = torch.zeros(size, seq_len, dtype=torch.int64, device=accelerator.device)
    # Reserve memory for AdamW's moments, DDP's buckets and overhead.
    num_bytes = (12 if accelerator.num_processes > 1 else 8) * num_parameters
    num_bytes += int(_RESERVED_SHARE * free_memory(accelerator.device))
    reserved = torch.empty(num_bytes, dtype=torch.uint8, device=accelerator.device)
    try:
        for _ in range(2):  # the second pass has the gradients of the first in memory
            with accelerator.autocast():
                model(input_ids=tokens, shift_labels=tokens, return_logits=False).loss.backward()
    finally:
        model.zero_grad()
        del reserved


def check_memory(plan: Plan, accelerator: Accelerator, *, is_dry_run: bool) -> None:
    """Compare the memory that the run needs with the machine's, before anything is loaded, and print a warning.

    With sharded parameters (FSDP2), which the estimate does not cover, this does nothing.

    Raises:
        TrainingError: parameters and optimizer alone are larger than all of the memory. A dry run, which may be for
            another machine, does not raise it.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        return
    device = accelerator.device
    num_sharing = plan.hardware.local_world_size if device.type == "cpu" else 1
    sizes = micro_batch_sizes(plan.batch, plan.hardware.num_processes)
    size = sizes[0] if plan.batch.micro_batch_size == "auto" else min(plan.batch.micro_batch_size, sizes[-1])
    memory, free = plan.estimate_memory(size), free_memory(device) / num_sharing
    total = total_memory(device) / num_sharing
    if memory.state > total and not is_dry_run:
        raise TrainingError(
            f"the parameters and the optimizer's moments take {_gigabytes(memory.state)} per process, and the memory "
            f"of {plan.hardware.name} is {_gigabytes(total)} for each: choose a smaller model (model.n_layer, "
            "model.n_embd, model.n_positions)"
        )
    if memory.total <= free:
        return
    fitting = [size for size in sizes if plan.estimate_memory(size).total <= free]
    remedy = f"--batch.micro_batch_size {fitting[-1]} or auto" if fitting else "a smaller model or batch.seq_len"
    sequences = f"{size} sequence{'s' if size > 1 else ''}"
    say(
        f"warning: with {sequences} at once, a process takes about {_gigabytes(memory.total)} (an estimate), and "
        f"{_gigabytes(free)} are free: it may run out of memory. Remedy: {remedy}"
    )


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f} GB"


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on the device; on a CPU, in the machine and in the container around it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError, KeyError):  # no limit ("max"), or not Linux
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        # Inactive page cache counts as used but is reclaimable.
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        inactive = int(statistics["inactive_file"])
        free = min(free, int((group / "memory.max").read_text()) - (used - inactive))
    return free


def total_memory(device: torch.device) -> int:
    """Return the bytes of the device; on a CPU, of the machine with its swap space."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return psutil.virtual_memory().total + psutil.swap_memory().total
