"""The loop gives the device its work and waits for nothing: not for a loss, a norm, or whether a number was finite."""

import json

# train.py, noting before each step how often the host has asked for a number that a device computes. What the model
# asks for is left out on a CPU: it does so there alone. On CUDA, torch's own warnings count, whoever asks.
PROGRAM = """
import json, sys, traceback, warnings
import torch
from torch.utils._python_dispatch import TorchDispatchMode
import train

READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "item"}

class Reads(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket._qualified_op_name.removeprefix("aten::") in READS:
            stack = traceback.extract_stack()
            Reads.count += not any("modeling_gpt2repro" in frame.filename for frame in stack)
        return function(*args, **(kwargs or {}))

learning_rate, before_step = train.learning_rate, []

def counted(*arguments):
    before_step.append([Reads.count, sum("synchronizing CUDA" in str(w.message) for w in warned)])
    return learning_rate(*arguments)

train.learning_rate = counted
with warnings.catch_warnings(record=True) as warned, Reads():
    warnings.simplefilter("always")
    torch.tensor(1.0).item()
    assert Reads.count == 1  # it does count
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
