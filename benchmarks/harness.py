"""Shared by the benchmarks: rounds, medians, ratios within a round, Markdown tables, the name of the hardware.

Candidates take turns, round by round, so that a slow minute of the machine affects all of them. Ratios compare two
results of the same round for the same reason.
"""

import argparse
import ast
import contextlib
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from common.markdown import table

Result = TypeVar("Result")


def make_parser(doc: str | None, *, rounds: int | None = None) -> argparse.ArgumentParser:
    """Return a benchmark's argument parser, with the option --rounds if it has a default."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{Path(sys.argv[0]).stem}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="turns of each candidate (default: %(default)s)")
    return parser


def take_turns(
    candidates: Mapping[str, Callable[[], Result]], rounds: int, describe: Callable[[Result], str]
) -> dict[str, list[Result]]:
    """Measure each candidate once per round, and return the results of each candidate in the order of the rounds."""
    results: dict[str, list[Result]] = {name: [] for name in candidates}
    for number in range(rounds):
        for name, measure in candidates.items():
            results[name].append(measure())
            print(f"round {number + 1}  {name:<24} {describe(results[name][-1])}", flush=True)
    return results


def timed(function: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """Return the function's result and its seconds, including work that it queued on the device."""
    wait = torch.get_device_module(device).synchronize  # on a CPU it does nothing
    wait()
    start = time.perf_counter()
    result = function()
    wait()
    return result, time.perf_counter() - start


def count_flops(function: Callable[[], object]) -> int:
    """Call the function and return the FLOPs of its matmuls and attention, as torch counts them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def pick_device() -> torch.device:
    """Return the GPU if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def with_range(values: Sequence[float], number_format: str) -> str:
    """Return "median (lowest to highest)"."""
    middle, lowest, highest = (format(f(values), number_format) for f in (statistics.median, min, max))
    return f"{middle} ({lowest} to {highest})"


def median_ratio(values: Sequence[float], reference: Sequence[float]) -> str:
    """Return the median of the ratios within a round, or "-" without a reference."""
    if not reference:
        return "-"
    return f"{statistics.median(value / other for value, other in zip(values, reference, strict=True)):.2f}"


def print_report(title: str, rounds: int, columns: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table below one line with the title, the hardware, the versions and the number of rounds."""
    print(f"\n{title}; {machine_name()}; median of {rounds} rounds (lowest to highest)\n\n{table(columns, rows)}")


def machine_name() -> str:
    """Return the GPU or the CPU, and the versions of torch and Python."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        name = platform.processor() or platform.machine()
        with contextlib.suppress(OSError):
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
        name = f"{torch.get_num_threads()} cores of {name}"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def load_definitions(path: str) -> dict[str, Any]:
    """Return a script's imports, classes and functions by name, without running the rest of the script."""
    module = types.ModuleType("lecture_script")
    sys.modules["lecture_script"] = module  # dataclasses and the compiler look the module up
    sys.path.insert(0, str(Path(path).resolve().parent))
    for node in ast.parse(Path(path).read_text(), filename=path).body:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.ClassDef | ast.FunctionDef):
            # The script may import packages that are not installed and that the functions used here do not need.
            with contextlib.suppress(ImportError):
                exec(compile(ast.Module([node], []), path, "exec"), vars(module))
    return vars(module)
