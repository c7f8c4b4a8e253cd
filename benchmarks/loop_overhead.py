"""Time what train.py does in a step besides forward, backward, clipping and optimizer: data, logging, the loop itself.

    python -m benchmarks.loop_overhead --max_steps 200          # the sample recipe; takes every setting of train.py
    python -m benchmarks.loop_overhead --config recipes/gpt2_124m.yaml --max_steps 5 --compile false ...

For a CPU, where a call returns when its work is done. (On a GPU the host runs ahead of the device.) Writes a run like
any other and prints the milliseconds of each part: medians over all steps but the first ten.
"""

import statistics
import time
from collections import defaultdict
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.harness import make_parser
from common.metrics import read_metrics
from modeling_gpt2repro import GPT2ReproForCausalLM

PARTS = ("forward", "backward", "clipping", "optimizer")
WARM_UP_STEPS = 10


def main() -> None:
    """Run train.py with timers around the parts of a step, and print the medians."""
    _, settings = make_parser(__doc__).parse_known_args()
    import train
    from training.config import load_config

    steps = time_parts(train)
    if code := train.train(settings):
        raise SystemExit(code)
    totals = [
        record["ms"] for record in read_metrics(f"{load_config(settings).output_dir}/metrics.jsonl") if "ms" in record
    ]
    for step, total in zip(steps, totals[-len(steps) :], strict=True):
        step |= {"rest": total - sum(step.values()), "step": total}
    steps = steps[WARM_UP_STEPS:] or steps
    for part in ("step", *PARTS):
        print(f"{part:<10} {statistics.median(step[part] for step in steps):9.2f} ms")
    rest = statistics.median(step["rest"] for step in steps)
    share = statistics.median(100 * step["rest"] / step["step"] for step in steps)
    print(f"{'the rest':<10} {rest:9.2f} ms, {share:.2f}% of a step (medians of {len(steps)})")


def time_parts(train: ModuleType) -> list[dict[str, float]]:
    """Patch the functions of the PARTS. Return a list that gets each training step's milliseconds by part."""
    steps: list[dict[str, float]] = []
    milliseconds: dict[str, float] = defaultdict(float)

    def add_timer(part: str, owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                if part != "forward" or torch.is_grad_enabled():  # not the forward passes of an evaluation
                    milliseconds[part] += 1000 * (time.perf_counter() - start)
                if part == "optimizer":
                    steps.append({name: milliseconds[name] for name in PARTS})
                    milliseconds.clear()

        setattr(owner, name, timed)

    add_timer("forward", GPT2ReproForCausalLM, "forward")
    add_timer("backward", torch.Tensor, "backward")
    add_timer("clipping", Accelerator, "clip_grad_norm_")
    add_timer("optimizer", train, "step_if_finite")  # the last of a step
    return steps


if __name__ == "__main__":
    main()
