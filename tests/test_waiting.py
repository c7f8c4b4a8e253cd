"""The loop gives the device its work and waits for nothing: not for a loss, a norm, or whether a number was finite."""

import json

# train.py, noting before each step how often the host has asked for a number that a device computes. Left out: the
# function that may wait, data that never was on a device, the model, which asks on a CPU alone. On CUDA, torch's own
# warnings count, whoever asks.
PROGRAM = """
import json, sys, traceback, warnings
import numpy, torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
import train

MAY_READ = ("modeling_gpt2repro/", "training/step_numbers.py", "/data/")
READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "item", "masked_select", "_unique2"}
COPIES = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__}
count = 0

def note():
    global count
    count += not any(part in frame.filename for frame in traceback.extract_stack() for part in MAY_READ)

class Reads(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket._qualified_op_name.removeprefix("aten::")
        is_masked = name in ("index", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in READS or is_masked:
            note()
        return function(*args, **(kwargs or {}))

class Copies(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # By name: a tensor's own device is often asked for.
        to_cpu = function is torch.Tensor.to and "cpu" in (*args[1:2], kwargs.get("device"))
        if (function in COPIES or to_cpu) and not kwargs.get("non_blocking"):
            note()
        return function(*args, **kwargs)

def asked_by(ask):
    before = count
    ask(torch.tensor([1.0, 0.0]))
    return count - before

learning_rate, before_step = train.learning_rate, []

def counted(*arguments):
    before_step.append([count, sum("synchronizing CUDA" in str(w.message) for w in warned)])
    return learning_rate(*arguments)

train.learning_rate = counted
with warnings.catch_warnings(record=True) as warned, Reads(), Copies():
    warnings.simplefilter("always")
    for ask in (
        lambda x: x[0].item(), lambda x: float(x[0]), lambda x: bool(x[0]), lambda x: x.tolist(), lambda x: x.numpy(),
        lambda x: numpy.asarray(x), lambda x: x.cpu(), lambda x: x.to("cpu"), lambda x: x.to(device="cpu"),
        lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.unique(), lambda x: torch.equal(x, x),
    ):
        assert asked_by(ask) > 0
    assert asked_by(lambda x: (x + 1).sum().to(torch.bfloat16)[None]) == 0
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("warn")
    train.train(sys.argv[1:])
print(json.dumps(before_step))
"""


def test_no_step_waits_for_the_device(launch, tiny, tmp_path):
    done = launch(
        *(PROGRAM, "--config", tiny, "--output_dir", tmp_path / "run", "--optim.muon_lr", "0.02"),
        *("--max_steps", "8", "--eval_every", "100", "--save_every", "100"),
        script="-c",
    )
    before_step = json.loads(done.stdout.splitlines()[-1])
    assert len(before_step) == 8
    assert before_step[1:] == [before_step[1]] * 7  # the first step may prepare something
