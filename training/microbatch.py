"""How a step's batch is cut into micro-batches, the largest that fit where `micro_batch_size: auto` asks for it."""

import math

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from training import TrainingError
from training.config import nearest_multiples
from training.hardware import free_memory
from training.plan import Plan

# What a run takes beside the trial: evaluation, fragmentation, the compiler's own plans.
_SPARE_SHARE = 0.1


def cut_batch(plan, accelerator, model=None):
    """
    Every process calls it.

    Args:
        plan: training.plan.Plan.
        model: on its device, before it is prepared; None to go by the estimate alone.

    Returns:
        (micro_batch_size, accumulation), the same on every process.

    Raises:
        TrainingError: the batch does not divide.
    """
    if plan.batch.micro_batch_size != "auto":
        return batch_arithmetic(plan.batch, plan.hardware.num_processes)
    sizes = micro_batch_sizes(plan.batch, plan.hardware.num_processes)
    step_of = None if model is None else trial_step(model, accelerator, plan.batch.seq_len)
    largest = largest_that_fits(
        sizes,
        needs=lambda size: plan.memory(size).total,
        step_of=step_of,
        device=accelerator.device,
        processes_here=plan.hardware.processes_here,
    )
    largest = int(accelerator.gather(torch.tensor([largest], device=accelerator.device)).min())
    return batch_arithmetic(plan.batch, plan.hardware.num_processes, largest)


def check_memory(plan: Plan, accelerator: Accelerator, *, is_dry_run: bool) -> list[str]:
    """
    Compare what the run needs with what the machine has, before anything is loaded.

    Returns:
        Lines of a warning, none where the estimate fits. None either where the parameters are sharded (FSDP, ZeRO),
        for which nothing is estimated.

    Raises:
        TrainingError: parameters and optimizer alone are larger than all of the memory (not in a dry run, which may be
            for another machine).
    """
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return []
    device, sharing = accelerator.device, plan.hardware.processes_here if accelerator.device.type == "cpu" else 1
    sizes = micro_batch_sizes(plan.batch, plan.hardware.num_processes)
    largest = sizes[0] if plan.batch.micro_batch_size == "auto" else min(plan.batch.micro_batch_size, sizes[-1])
    needed, free = plan.memory(largest), free_memory(device) / sharing
    state, total = needed.state, _total_memory(device) / sharing
    if state > total and not is_dry_run:
        raise TrainingError(
            f"the parameters and the optimizer's moments take {_gigabytes(state)} a process, and the memory of "
            f"{plan.hardware.name} is {_gigabytes(total)} for each: choose a smaller model (model.n_layer, "
            "model.n_embd, model.n_positions)"
        )
    if needed.total <= free:
        return []
    fitting = [size for size in sizes if plan.memory(size).total <= free]
    remedy = f"--batch.micro_batch_size {fitting[-1]} or auto" if fitting else "a smaller model or batch.seq_len"
    sequences = f"{largest} sequence{'s' if largest > 1 else ''}"
    return [
        f"warning: with {sequences} at once, a process takes about {_gigabytes(needed.total)} (an estimate), and "
        f"{_gigabytes(free)} are free: it may run out of memory. Remedy: {remedy}"
    ]


def _total_memory(device: torch.device) -> float:
    """Return the bytes of the device, or on a CPU of the machine with its swap."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return psutil.virtual_memory().total + psutil.swap_memory().total


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f} GB"


def largest_that_fits(sizes, *, needs, step_of, device, processes_here):
    """
    The most sequences that a process can train on at once.

    Args:
        sizes: candidates.
        needs: function of a size, the estimated bytes.
        step_of: function of a size that runs a forward and a backward pass, or None to go by the estimate. A CPU has no
            error for too little memory, so there the estimate decides in any case.
        processes_here: of this machine; on a CPU they share its memory.

    Returns:
        int; the smallest size if none fits, so that the error is the run's own.
    """
    free = free_memory(device) * (1 - _SPARE_SHARE)
    sizes = sorted(sizes, reverse=True)
    if device.type == "cpu" or step_of is None:
        shared_by = processes_here if device.type == "cpu" else 1
        return next((size for size in sizes if needs(size) <= free / shared_by), sizes[-1])
    for size in sizes:
        if needs(size) > 1.5 * free:  # the estimate is not that far off
            continue
        try:
            step_of(size)
            return size
        except RuntimeError as error:  # torch.OutOfMemoryError is one; Apple's is not of that class
            if "out of memory" not in str(error):
                raise
        torch.get_device_module(device).empty_cache()
    return sizes[-1]


def trial_step(model, accelerator, seq_len):
    """`step_of` for a model on its device, before it is prepared; leaves neither gradients nor moments behind."""
    num_parameters = sum(p.numel() for p in model.parameters())

    def step_of(size):
        tokens = torch.zeros(size, seq_len, dtype=torch.int64, device=accelerator.device)
        # What is not there yet: AdamW's moments, DDP's buckets, and what a run takes beside.
        num_bytes = (12 if accelerator.num_processes > 1 else 8) * num_parameters
        num_bytes += int(_SPARE_SHARE * free_memory(accelerator.device))
        reserved = torch.empty(num_bytes, dtype=torch.uint8, device=accelerator.device)
        try:
            for _ in range(2):  # the second time, the gradients of the first are there
                with accelerator.autocast():
                    model(input_ids=tokens, shift_labels=tokens, return_logits=False).loss.backward()
        finally:
            model.zero_grad()
            del reserved

    return step_of


def batch_arithmetic(batch, num_processes, largest=None):
    """
    Splits an optimizer step into micro-batches: micro x seq_len x accumulation x processes = tokens a step.

    Args:
        batch: BatchConfig.
        num_processes: data-parallel processes.
        largest: for micro_batch_size "auto", the one of `micro_batch_sizes` that fits into memory.

    Returns:
        (micro_batch_size, accumulation_steps), both exact.

    Raises:
        TrainingError: it does not divide; the message has the nearest values that do.
    """
    divisors = micro_batch_sizes(batch, num_processes)
    per_process = divisors[-1]
    most = (largest or per_process) if batch.micro_batch_size == "auto" else batch.micro_batch_size
    micro_batch_size = min(most, per_process)
    if per_process % micro_batch_size:
        below = max(n for n in divisors if n < micro_batch_size)
        above = min(n for n in divisors if n > micro_batch_size)
        raise TrainingError(
            f"batch.micro_batch_size={micro_batch_size} does not divide the {per_process} sequences of a step "
            f"on each of {num_processes} process(es); nearest micro_batch_size: {below} or {above}"
        )
    return micro_batch_size, per_process // micro_batch_size


def micro_batch_sizes(batch, num_processes):
    """
    The sizes that "auto" chooses from: [1, ..., all], each dividing a process's sequences of a step.

    Raises:
        TrainingError: the processes cannot share the sequences of a step evenly; the message has the nearest values.
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
