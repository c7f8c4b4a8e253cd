"""`--profile N`: record N training steps with torch's profiler."""

import contextlib
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import TypeVar

from torch.autograd import DeviceType
from torch.profiler import profile, schedule

from common.cli import is_main_process, say

WARM_UP_STEPS = 3  # they compile and allocate memory; in the last one the profiler runs and nothing is kept
NUM_ROWS = 16
Batch = TypeVar("Batch")


def profiled(
    batches: Generator[Batch, None, None], num_steps: int | None, folder: str | Path
) -> Generator[Batch, None, None]:
    """Yield the batches of training steps, and write a trace of some of the steps to profile.json.gz in the folder.

    A step lasts until the next batch is requested. Operations and kernels are also summed up in a table on the console.

    Args:
        num_steps: steps to record, after WARM_UP_STEPS, on the main process; None: no step.
    """
    if num_steps is None or not is_main_process():
        yield from batches
        return
    when = schedule(wait=WARM_UP_STEPS - 1, warmup=1, active=num_steps, repeat=1)
    write = partial(_write, path=Path(folder) / "profile.json.gz")
    with contextlib.closing(batches), profile(schedule=when, on_trace_ready=write, acc_events=True) as profiler:
        for batch in batches:
            yield batch
            profiler.step()
        if profiler.step_num <= WARM_UP_STEPS:
            say(f"profile   nothing: {profiler.step_num} steps were left; the first {WARM_UP_STEPS} are not recorded")


def _write(profiler: profile, path: Path) -> None:
    num_steps = profiler.step_num - WARM_UP_STEPS  # fewer than requested if the run ended before
    if num_steps < 1:
        return
    profiler.export_chrome_trace(str(path))
    say(f"profile   {num_steps} steps, in {path}: open it in https://ui.perfetto.dev or chrome://tracing")
    # The kernels that took the longest, or on a CPU the operations: one line each, as averages per step.
    events = [event for event in profiler.key_averages() if not event.is_user_annotation]
    kernels = [event for event in events if event.device_type != DeviceType.CPU]
    if kernels:
        rows = [(event.self_device_time_total, event.count, event.key) for event in kernels]
    else:
        rows = [(event.self_cpu_time_total, event.count, event.key) for event in events]
    total = sum(microseconds for microseconds, *_ in rows) or 1
    lines = [f"          ms per step  share  calls  {'kernel' if kernels else 'operation'}"]
    for microseconds, calls, name in sorted(rows, reverse=True)[:NUM_ROWS]:
        milliseconds = microseconds / 1000 / num_steps
        lines.append(
            f"          {milliseconds:11.2f} {microseconds / total:6.1%} {calls / num_steps:6.0f}  {name[:90]}"
        )
    say("\n".join([*lines, f"          {total / 1000 / num_steps:11.2f}  all {len(rows)}"]))
