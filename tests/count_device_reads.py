"""
A program for test_waiting.py: run train.py and print, as JSON, how often the host reads a number of the device in each
step, and (on CUDA) torch's warnings about synchronization in each step.

The model and the data are left out: on a CPU the model looks at its inputs, and the data was never on a device.
"""

import json
import sys
import traceback
import warnings
from itertools import pairwise

import numpy
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import train

NOT_COUNTED = ("modeling_gpt2repro/", "/data/")
READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "item", "masked_select", "_unique2"}
COPIES = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__}
num_reads = 0


def count_read() -> None:
    """Count a read, unless the model or the data is responsible for it."""
    global num_reads
    num_reads += not any(part in frame.filename for frame in traceback.extract_stack() for part in NOT_COUNTED)


class CountReads(TorchDispatchMode):
    """Count operators whose result or shape the host has to know."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket._qualified_op_name.removeprefix("aten::")
        is_masked = name in ("index", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in READS or is_masked:
            count_read()
        return function(*args, **(kwargs or {}))


class CountCopies(TorchFunctionMode):
    """Count copies to the host."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to_cpu = function is torch.Tensor.to and "cpu" in (*args[1:2], kwargs.get("device"))
        if (function in COPIES or to_cpu) and not kwargs.get("non_blocking"):
            count_read()
        return function(*args, **kwargs)


def reads_of(function) -> int:
    """Return the number of reads that a function of a tensor makes."""
    before = num_reads
    function(torch.tensor([1.0, 0.0]))
    return num_reads - before


learning_rate, counts = train.learning_rate, []


def learning_rate_and_count(*args):  # called once at the start of a step
    counts.append([num_reads, sum("synchronizing CUDA" in str(w.message) for w in caught)])
    return learning_rate(*args)


train.learning_rate = learning_rate_and_count
with warnings.catch_warnings(record=True) as caught, CountReads(), CountCopies():
    warnings.simplefilter("always")
    for function in (
        *(lambda x: x[0].item(), lambda x: float(x[0]), lambda x: bool(x[0]), lambda x: x.tolist()),
        *(lambda x: x.numpy(), lambda x: numpy.asarray(x), lambda x: x.cpu(), lambda x: x.to("cpu")),
        *(lambda x: x.to(device="cpu"), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.unique()),
        lambda x: torch.equal(x, x),
    ):
        assert reads_of(function) > 0
    assert reads_of(lambda x: x.tolist()) == 1
    assert reads_of(lambda x: (x + 1).sum().to(torch.bfloat16)[None]) == 0
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("warn")
    train.train(sys.argv[1:])
print(json.dumps([[b - a for a, b in zip(*pair, strict=True)] for pair in pairwise(counts)]))
