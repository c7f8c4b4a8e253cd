"""micro_batch_size: auto."""

import torch

from training.hardware import free_memory

# What a run takes beside the probe: evaluation, fragmentation, the compiler's own plans.
_SHARE_OF_FREE_MEMORY = 0.9


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
    free = free_memory(device) * _SHARE_OF_FREE_MEMORY
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
        # What is not there yet: AdamW's moments, DDP's buckets.
        num_bytes = (12 if accelerator.num_processes > 1 else 8) * num_parameters
        reserved = torch.empty(num_bytes, dtype=torch.uint8, device=accelerator.device)
        try:
            with accelerator.autocast():
                model(input_ids=tokens, shift_labels=tokens, return_logits=False).loss.backward()
        finally:
            model.zero_grad()
            del reserved

    return step_of
