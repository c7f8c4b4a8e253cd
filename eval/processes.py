"""The other processes of an evaluation, where `accelerate launch` started several."""

import torch.distributed as dist


def rank_and_number():
    """(number of this process, how many there are): (0, 1) outside a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def gather(thing):
    """Every process calls it with something that can be pickled; each gets the list of them all, by rank."""
    number = rank_and_number()[1]
    if number == 1:
        return [thing]
    things = [None] * number
    dist.all_gather_object(things, thing)
    return things
