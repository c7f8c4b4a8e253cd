"""micro_batch_size: auto."""

import torch

from training.hardware import free_memory

# What a run takes beside the probe: evaluation, fragmentation, the compiler's own plans.
_SHARE_OF_FREE_MEMORY = 0.9


def largest_that_fits(sizes, *, needs, try_step, device, processes_here):
    """
    The most sequences that a process can train on at once.

    Args:
        sizes: candidates.
        needs: function of a size, the estimated bytes.
        try_step: function of a size that runs a forward and a backward pass and leaves nothing behind; on a GPU it has
            the last word. A CPU has no error for too little memory, so there the estimate decides.
        processes_here: of this machine; on a CPU they share its memory.

    Returns:
        int; the smallest size if none fits, so that the error is the run's own.
    """
    free = free_memory(device) * _SHARE_OF_FREE_MEMORY
    sizes = sorted(sizes, reverse=True)
    if device.type == "cpu":
        return next((size for size in sizes if needs(size) <= free / processes_here), sizes[-1])
    for size in sizes:
        if needs(size) > 1.5 * free:  # the estimate is not that far off
            continue
        try:
            try_step(size)
            return size
        except RuntimeError as error:  # torch.OutOfMemoryError is one; Apple's is not of that class
            if "out of memory" not in str(error):
                raise
        torch.get_device_module(device).empty_cache()
    return sizes[-1]
