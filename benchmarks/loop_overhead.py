"""
What train.py spends in a step outside of forward, backward, clipping and optimizer: waiting for data, logging, itself.

    python benchmarks/loop_overhead.py --max_steps 200                  # the sample recipe; any setting of train.py
    python benchmarks/loop_overhead.py --config recipes/gpt2_124m.yaml --max_steps 5 --compile false ...

On a CPU, where a call returns when its work is done. (A GPU works on behind the host's back; there it is the device
that must not be kept waiting: tests/test_waiting.py.) Writes a run like any other, prints a table of
milliseconds a step: the median over all steps but the first ten.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # train.py is not installed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    _, settings = parser.parse_known_args()
    import train

    steps, spent = [], Counter()

    def clocked(owner, name, part):
        function = getattr(owner, name)

        def timed(*arguments, **more):
            started = time.perf_counter()
            try:
                return function(*arguments, **more)
            finally:
                spent[part] += 1000 * (time.perf_counter() - started)

        setattr(owner, name, timed)

    clocked(train.GPT2ReproForCausalLM, "forward", "forward")
    clocked(torch.Tensor, "backward", "backward")
    clocked(train, "clip_gradients", "clipping")
    clocked(train, "step_if_finite", "optimizer")
    learning_rate, log_step = train.learning_rate, train.RunLog.step

    def start(*arguments):  # the first call of a step
        spent.clear()
        return learning_rate(*arguments)

    def log(self, record):
        steps.append({"step": record["ms"], **spent})
        log_step(self, record)

    train.learning_rate, train.RunLog.step = start, log
    code = train.train(settings)
    if code:
        raise SystemExit(code)
    measured = steps[10:] or steps
    rest = [step["step"] - sum(value for part, value in step.items() if part != "step") for step in measured]
    for part in ("step", "forward", "backward", "clipping", "optimizer"):
        print(f"{part:<10} {statistics.median(step[part] for step in measured):9.2f} ms")
    shares = [100 * ours / step["step"] for ours, step in zip(rest, measured, strict=True)]
    share = statistics.median(shares)
    print(f"{'the rest':<10} {statistics.median(rest):9.2f} ms, {share:.2f}% of a step (medians of {len(measured)})")


if __name__ == "__main__":
    main()
