"""How a step's batch is cut into micro-batches, the largest that fit where `micro_batch_size: auto` asks for it."""

import torch

from training import TrainingError
from training.config import nearest_multiples
from training.hardware import free_memory

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
    return [n for n in range(1, per_process + 1) if per_process % n == 0]
