"""Write report.html: a run on one page, for the browser of a computer or a phone, without a network.

    python -m training.report runs/sample            of a run that exists, finished or not
    python -m training.report "runs/seed*"           a pattern

train.py writes it when a run ends. The page leaves out what the run's folder does not have.
"""

import argparse
import dataclasses
import functools
import io
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from common.cli import Parser, prepare_process, run_command

if __name__ == "__main__":
    prepare_process()

import yaml

from common.files import read_json, write_text_atomically
from common.metrics import read_metrics
from training import TrainingError
from training.compare import run_folders
from training.config import Config
from training.curves import draw_losses, draw_scores, format_score, metric_names, score_name, scores_of, tasks_to_draw
from training.estimate import format_duration

_TEMPLATE = Path(__file__).with_name("report.html.jinja")
# A file of accelerate_configs for each kind of parallel training.
_LAUNCHER_CONFIGS = {"FSDP": "fsdp2", "MULTI_GPU": "ddp_8gpu", "MULTI_CPU": "cpu_2proc"}
_MAX_ROWS = 12  # evaluations shown
_MAX_POINTS = 2000  # steps of the loss curve: a picture in vectors grows with them
# Colors of matplotlib's picture that follow the page, light or dark.
_PAGE_COLORS = {"#000000": "currentColor", "#010203": "var(--card)", "#1f77b4": "var(--accent)"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run_command(report, argv)


def report(argv: Sequence[str] | None) -> None:
    """Write the reports of runs and print their paths."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or a pattern")
    for folder in run_folders(parser.parse_args(argv).runs):
        try:
            print(write_report(folder))
        except PermissionError as error:  # another user's run
            raise TrainingError(f"{folder}: the report cannot be written ({error.strerror})") from error


def write_report(folder: Path, *, failure: str | None = None) -> Path:
    """Write report.html into a run's folder and return its path.

    Args:
        failure: the error that is ending the run, which status.json does not have yet.

    Raises:
        UserError: metrics.jsonl cannot be read.
    """
    from jinja2 import ChainableUndefined, Environment

    # ChainableUndefined: in the records of earlier versions, fields of fields are missing.
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=ChainableUndefined)
    environment.filters |= {"thousands": "{:,}".format, "four_places": "{:.4f}".format}
    environment.filters |= {"score": format_score, "metric_names": metric_names, "score_name": score_name}
    environment.filters |= {"short_number": short_number, "duration": format_duration, "yaml": _yaml}
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(gather_facts(folder, failure))
    path = folder / "report.html"
    write_text_atomically(path, page.encode(errors="replace").decode())  # a folder's name may have other bytes
    return path


def gather_facts(folder: Path, failure: str | None = None) -> dict[str, Any]:
    """Return what the template shows of a run."""
    records = read_metrics(folder / "metrics.jsonl")
    provenance, status = read_json(folder / "provenance.json"), read_json(folder / "status.json")
    if failure is not None:
        status = {"status": "failed", "error": failure}
    steps = [r for r in records if "lr" in r or "loss" in r]
    seconds = accumulate(r["ms"] / 1000 if "ms" in r else r.get("seconds", 0) for r in records)
    evaluations = [r | {"elapsed": s} for r, s in zip(records, seconds, strict=True) if r.get("val_loss") is not None]
    evaluated = [r for r in records if "val_loss" in r]
    best = min(evaluations, key=lambda r: r["val_loss"], default={})
    settings = provenance.get("config") or {}
    defaults = _flatten(json.loads(json.dumps(dataclasses.asdict(Config()))))
    lines = {"loss": {}, "hellaswag": {}} | (provenance.get("references") or {})
    lines["hellaswag"] = {"chance": 0.25} | lines["hellaswag"]  # earlier versions did not record chance
    last_scored = {task: record for record in evaluations for task in scores_of(record)}
    training_seconds = sum(r.get("ms", 0) for r in steps) / 1000
    rates = [r["tokens_per_s"] for r in steps if "tokens_per_s" in r]
    hardware = provenance.get("hardware") or {}
    dollars = hardware.get("dollars_per_hour", hardware.get("dollars_an_hour"))
    evaluation_seconds = sum(r.get("seconds", 0) for r in evaluated)
    return {
        "name": folder.absolute().name,
        "status": status,
        "run": provenance,
        "launches": [*provenance.get("earlier_launches", []), provenance],
        "launcher": _launcher_options(hardware),
        "settings": settings,
        "changed": [
            (name, _yaml(value), _yaml(defaults[name]) if name in defaults else "")
            for name, value in _flatten(settings).items()
            if name not in ("output_dir", "resume") and (name not in defaults or value != defaults[name])
        ],
        "last_step": steps[-1] if steps else {},
        "skipped": [r for r in steps if "skipped" in r],
        "evaluations": evaluations,
        "rows": thin_out(evaluations, keep=lambda r: r is best),
        "last": evaluations[-1] if evaluations else {},
        "last_scores": {task: scores_of(record)[task] for task, record in last_scored.items()},
        "scored_at": {task: record["step"] for task, record in last_scored.items()},
        "best": best,
        "samples": thin_out([r for r in evaluations if r.get("samples")])[::-1],
        "prompts": (settings.get("eval") or {}).get("prompts") or [],
        "lines": lines,
        "is_finite": not evaluated or evaluated[-1]["val_loss"] is not None,
        "perplexity": math.exp(min(evaluations[-1]["val_loss"], 700)) if evaluations else None,
        "training_seconds": training_seconds,
        "evaluation_seconds": evaluation_seconds,
        "tokens_per_s": statistics.median(rates) if rates else None,
        "dollars": dollars and dollars * hardware.get("processes", 1) * (training_seconds + evaluation_seconds) / 3600,
        "pictures": draw_curves(records, lines) if steps else {},
    }


def _launcher_options(hardware: Mapping[str, Any]) -> str:
    """Return the options of `accelerate launch` for a run's processes; "" for one process."""
    config = _LAUNCHER_CONFIGS.get(hardware.get("distributed", ""))
    if hardware.get("machines", 1) > 1 and config == "ddp_8gpu":
        config = "multi_node_ddp"
    return f"--config_file accelerate_configs/{config}.yaml --num_processes {hardware['processes']} " if config else ""


def draw_curves(records: Sequence[dict[str, Any]], lines: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """Return the curves of curves.png by name ("loss", tasks) as SVG pictures in the page's font and colors."""
    import matplotlib
    from matplotlib.figure import Figure

    steps = [r for r in records if "val_loss" not in r and "skipped" not in r]
    every = math.ceil(len(steps) / _MAX_POINTS) or 1
    left_out = {id(r) for number, r in enumerate(steps, start=1) if number % every}
    records = [r for r in records if id(r) not in left_out]
    pictures = {}
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "report", "legend.facecolor": "#010203"}
    tasks = [t for t in tasks_to_draw(records) if any(t in scores_of(r) for r in records if r["step"])]
    for name in ("loss", *tasks):
        draw = draw_losses if name == "loss" else functools.partial(draw_scores, task=name)
        with matplotlib.rc_context(style), io.StringIO() as file:
            figure = Figure(figsize=(5.6, 3.7), layout="constrained")
            figure.patch.set_visible(False)
            axes = figure.subplots()
            axes.patch.set_visible(False)
            draw(axes, records, lines.get(name) or {})
            figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
            svg = file.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r' id="[A-Za-z_0-9]+_\d+"', "", svg)  # the second picture would have the same ones
        pictures[name] = re.sub("|".join(_PAGE_COLORS), lambda match: _PAGE_COLORS[match[0]], svg)
    return pictures


def thin_out(rows: list[Any], keep: Callable[[Any], bool] = lambda _: False) -> list[Any]:
    """Return at most _MAX_ROWS rows at even distances, the first and the last among them, and those to keep."""
    distance = max(1.0, (len(rows) - 1) / (_MAX_ROWS - 1))
    shown = {round(number * distance) for number in range(_MAX_ROWS)}
    return [row for number, row in enumerate(rows) if number in shown or keep(row)]


def short_number(value: float) -> str:
    """Return 124439808 as "124M"."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"optim.lr": ...} from nested settings. A mixture is one value."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        is_group = isinstance(value, dict) and not prefix
        flat |= _flatten(value, f"{name}.") if is_group else {f"{prefix}{name}": value}
    return flat


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, sort_keys=False, default_flow_style=None, allow_unicode=True, width=110)
    return text.removesuffix("...\n").rstrip()


if __name__ == "__main__":
    sys.exit(main())
