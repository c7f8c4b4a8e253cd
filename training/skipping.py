"""Steps that are skipped because their loss or gradient was not finite, and which windows they were to learn from."""

import torch
from accelerate.utils import gather_object

# Device types on which an optimizer's step looks by itself whether it is to be skipped (fused AdamW's `found_inf`).
_SKIPS_ON_DEVICE = ("cpu", "cuda")


def step_where_finite(optimizer, is_finite):
    """
    The optimizer's step, which changes nothing where something was not finite. On a GPU the host does not wait.

    Args:
        optimizer: as `accelerator.prepare` gave it.
        is_finite: scalar bool tensor on the device, the same on every process.
    """
    if is_finite.device.type in _SKIPS_ON_DEVICE:
        optimizer.optimizer.found_inf = is_finite.logical_not().float()
        optimizer.step()
    elif is_finite.item():
        optimizer.step()


def suspect_windows(losses, places):
    """
    Every process calls it.

    Args:
        losses: list of this process's micro-batches' losses, scalar tensors.
        places: list of where its rows come from, in the order of the micro-batches.

    Returns:
        list of places, of all processes: rows of micro-batches whose loss was not finite; where all losses were (and
        the gradient was not), all rows.
    """
    rows = len(places) // len(losses)
    is_bad = torch.stack(losses).isfinite().logical_not().repeat_interleave(rows).tolist()
    return gather_object([place for place, bad in zip(places, is_bad, strict=True) if bad]) or gather_object(places)
