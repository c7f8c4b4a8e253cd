"""Compare runs that exist: one table and one picture.

    python -m training.compare runs/adamw runs/fast            two runs
    python -m training.compare "runs/seed*" --out seeds.png    a pattern; runs that differ only in the seed are one line

The table has the last values; the picture has the validation loss over tokens and over hours of training. Runs with the
same settings except seed and folder are a group: the mean, and the standard deviation over its seeds. For more, metrics
open in pandas: `pandas.read_json("runs/x/metrics.jsonl", lines=True)`.
"""

import argparse
import glob
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.cli import Parser, prepare_process, run_command, say

if __name__ == "__main__":
    prepare_process()

from common import markdown
from common.files import atomic_write
from common.metrics import read_metrics
from training import TrainingError
from training.config import WITHOUT_EFFECT
from training.curves import finish_axes

_NOT_COMPARED = WITHOUT_EFFECT | {"seed", "dollars_an_hour"}  # the last is a name in older runs
COLUMNS = ("run", "seeds", "parameters", "tokens", "val loss", "HellaSwag", "hours", "tokens/s")


class Run(NamedTuple):
    """A run, read from its folder."""

    name: str
    experiment: str
    """equal for runs that differ only in the seed, or in what does not change the losses"""
    data: str | None
    """hash of the training data; None for shards without a manifest"""
    parameters: int
    val_losses: list[tuple[int, float, float]]
    """(tokens, hours of training so far, loss) of each evaluation; the loss is infinite if it was not finite"""
    hellaswag: float
    """accuracy by the lecture's convention; NaN if it was not scored"""
    tokens_per_s: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run_command(compare, argv)


def compare(argv: Sequence[str] | None) -> None:
    """Print the table and draw the picture."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or a pattern")
    parser.add_argument("--out", type=Path, default=Path("runs/comparison.png"), help="picture (default: %(default)s)")
    args = parser.parse_args(argv)
    groups: dict[str, list[Run]] = defaultdict(list)
    for folder in run_folders(args.runs):
        run = read_run(folder)
        groups[run.experiment].append(run)
    print(table([*groups.values()]))
    if len({run.data for runs in groups.values() for run in runs}) > 1:
        say("warning: these runs have different data, so their losses are not comparable")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        draw([*groups.values()], args.out)
    except (PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError) as error:
        raise TrainingError(f"--out {str(args.out)!r} cannot be written ({error.strerror}): name another") from error
    print(f"\n{args.out}")


def run_folders(patterns: list[str]) -> list[Path]:
    """Return the run folders that paths and patterns name, each once."""
    folders: dict[Path, None] = {}
    for pattern in patterns:
        names = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern))  # noqa: PTH207 (absolute ones, too)
        paths = map(Path, names)
        found = [path for path in paths if (path / "metrics.jsonl").is_file()]
        if not found:
            raise TrainingError(f"{pattern}: no run there (a folder with metrics.jsonl), as train.py makes it")
        folders |= dict.fromkeys(found)
    return [*folders]


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        UserError: provenance.json or metrics.jsonl cannot be read, or no step was evaluated.
    """
    try:
        provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
        settings, parameters = provenance["config"], provenance["model"]["parameters"]
        data = provenance["data"].get("train_sha256")
    except (OSError, ValueError, KeyError) as error:
        raise TrainingError(f"{folder / 'provenance.json'} cannot be read ({error}): compare another run") from None
    records = read_metrics(folder / "metrics.jsonl")
    experiment = {name: value for name, value in settings.items() if name not in _NOT_COMPARED}
    val_losses, milliseconds, tokens, hellaswag = [], 0.0, 0, math.nan
    for record in records:
        milliseconds += record.get("ms", 0)
        tokens = record.get("tokens", tokens)
        if "val_loss" in record:
            loss = math.inf if record["val_loss"] is None else record["val_loss"]
            val_losses.append((tokens, milliseconds / 3.6e6, loss))
            scores = record.get("hellaswag")
            hellaswag = scores["acc_norm"] if scores and not scores["is_sample"] else hellaswag
    if not val_losses:
        raise TrainingError(f"{folder}: no step has been evaluated yet")
    rates = [record["tokens_per_s"] for record in records if "tokens_per_s" in record]
    rate = statistics.median(rates) if rates else math.nan
    key = json.dumps([experiment, data], sort_keys=True)
    return Run(folder.name, key, data, parameters, val_losses, hellaswag, rate)


def table(groups: list[list[Run]]) -> str:
    """Return the table as Markdown, the lowest loss first."""
    rows = []
    for runs in sorted(groups, key=lambda runs: statistics.fmean(run.val_losses[-1][2] for run in runs)):
        first = runs[0]
        rows.append(
            [
                _group_name(runs),
                str(len(runs)),
                f"{first.parameters:,}",
                f"{first.val_losses[-1][0]:,}",
                _mean_and_deviation([run.val_losses[-1][2] for run in runs]),
                _mean_and_deviation([run.hellaswag for run in runs if not math.isnan(run.hellaswag)]),
                f"{statistics.fmean(run.val_losses[-1][1] for run in runs):.2f}",
                f"{statistics.fmean(run.tokens_per_s for run in runs):,.0f}",
            ]
        )
    return markdown.table(COLUMNS, rows)


def _group_name(runs: list[Run]) -> str:
    return runs[0].name if len(runs) == 1 else f"{runs[0].name} to {runs[-1].name}"


def _mean_and_deviation(values: list[float]) -> str:
    if not values:
        return "-"
    if not all(map(math.isfinite, values)):
        return "not finite"
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{deviation}"


def draw(groups: list[list[Run]], path: Path) -> None:
    """Draw the validation losses over tokens and over hours of training, a color for each group."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    by_tokens, by_hours = figure.subplots(1, 2, sharey=True)
    for number, runs in enumerate(groups):
        for index, run in enumerate(runs):
            style: dict[str, Any] = {"color": f"C{number}", "marker": "o", "ms": 3, "lw": 1.2, "alpha": 0.8}
            label = _group_name(runs) if index == 0 else None
            tokens, hours, losses = zip(*run.val_losses, strict=True)
            by_tokens.plot(tokens, losses, label=label, **style)
            by_hours.plot(hours, losses, **style)
    trained = [loss for runs in groups for run in runs for _, _, loss in run.val_losses[1:] if math.isfinite(loss)]
    if trained:  # the loss before training would flatten the rest
        margin = 0.05 * (max(trained) - min(trained)) or 0.1
        by_tokens.set_ylim(min(trained) - margin, max(trained) + margin)
    by_tokens.set(ylabel="validation loss, nats per token")
    finish_axes(by_tokens)
    by_hours.set(xlabel="hours of training")
    by_hours.grid(alpha=0.3)
    with atomic_write(path) as tmp_path:
        figure.savefig(tmp_path, format="png", dpi=120)


if __name__ == "__main__":
    sys.exit(main())
