"""Steps that are skipped because their loss or gradient was not finite: which windows they were to learn from."""

import torch
from accelerate.utils import gather_object


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
