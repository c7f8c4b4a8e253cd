r"""Train the same model by several recipes, and compare the tokens and seconds each needs to reach a validation loss.

    python -m benchmarks.race adamw=recipes/gpt2_124m.yaml fast=recipes/gpt2_124m_fast.yaml --out runs/race
    python -m benchmarks.race adamw=benchmarks/race_small.yaml fast=benchmarks/race_small_fast.yaml \
        wd0=benchmarks/race_small_fast.yaml,optim.muon_weight_decay=0 --seeds 1 2 3 --out runs/race_small

NAME=RECIPE[,SETTING=VALUE...] is a runner. The last validation loss of the first one, the reference, is the goal. Each
run is `accelerate launch train.py`. The runners take turns for each seed, and see the same batches with the same seed
if their batches have the same size. Started again, the race resumes an interrupted run and keeps those that finished or
diverged. A run that diverges has not reached the goal; a run that fails for another reason ends the race.

Writes one folder per run (NAME/SEED), race.json and race.png (loss over tokens and over seconds). Prints a Markdown
table: mean and standard deviation over the seeds. Ratios compare runs of the same seed and are read off straight lines
between evaluations, so they are only as precise as the evaluations are frequent. Seconds are those of the steps,
including the first step's compilation and excluding evaluations and saving.
"""

import argparse
import dataclasses
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import make_parser
from common.errors import UserError
from common.files import finite
from common.markdown import table
from common.metrics import read_metrics
from training.config import Config, load_config


class Point(NamedTuple):
    """One evaluation of a run; `loss` is infinite if it was not finite."""

    tokens: float
    seconds: float
    loss: float


Curve = list[Point]  # a run's evaluations, in order
Curves = dict[str, dict[int, Curve]]  # by runner and seed, the reference first


def main() -> None:
    """Parse the arguments, train and compare."""
    args = parse_args()
    folders = {(name, seed): args.out / name / str(seed) for seed in args.seeds for name in args.runners}
    configs = {(name, seed): check(path, args.runners[name], seed) for (name, seed), path in folders.items()}
    check_comparable(configs.values())  # before hours of training
    curves: Curves = {name: {} for name in args.runners}
    for (name, seed), folder in folders.items():
        has_finished = train(folder, args.runners[name], args.launch, configs[name, seed])
        curve = validation_curve(read_metrics(folder / "metrics.jsonl"), has_finished)
        curves[name][seed] = curve
        tokens, seconds, loss = curve[-1]
        print(f"{name} {seed}: {loss:.4f} after {tokens:,} tokens, {seconds:,.0f} s of training", flush=True)
        if name == next(iter(args.runners)) and not math.isfinite(loss):
            raise SystemExit(f"error: {folder}: the reference run diverged; see console.log there")
    origins = {origin(folder) for folder in folders.values()}
    if len(origins) > 1:
        print("\nwarning: the runs differ in machine or code:", *sorted(origins), sep="\n    ")
    rows = compare(curves)
    (args.out / "race.json").write_text(json.dumps(finite({"curves": curves, "rows": rows}), indent=1) + "\n")
    plot(curves, args.out / "race.png")
    print(f"\n{format_rows(rows)}")


def parse_args() -> argparse.Namespace:
    """Return the arguments; `runners` is {name: options of train.py}."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "runners", nargs="+", metavar="NAME=RECIPE[,SETTING=VALUE...]", help="the first is the reference"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1337, 1338, 1339])
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs, race.json and race.png")
    parser.add_argument("--launch", default="", help="options of `accelerate launch`, in one argument")
    args = parser.parse_args()
    runners = {}
    for runner in args.runners:
        name, _, rest = runner.partition("=")
        recipe, *settings = re.split(r",(?![^\[{]*[\]}])", rest)  # not at commas within [] or {}
        if not Path(recipe).is_file():
            parser.error(f"{runner}: recipe {recipe!r} not found")
        if name in runners:
            parser.error(f"two runners are named {name!r}: give each its own name")
        pairs = (setting.partition("=") for setting in settings)
        runners[name] = ["--config", recipe, *(part for key, _, value in pairs for part in (f"--{key}", value))]
    args.runners = runners
    return args


def check(folder: Path, settings: list[str], seed: int) -> Config:
    """Return the run's config; exit if it is invalid, or not the config of the run that is in the folder."""
    try:
        config = load_config([*settings, "--seed", str(seed)])
    except UserError as error:
        raise SystemExit(f"error: {folder}: {error}") from None
    path = folder / "provenance.json"
    if path.is_file():
        config_there = json.loads(path.read_text())["config"]
        ours = json.loads(json.dumps(dataclasses.asdict(config)))
        ignored = {"output_dir", "resume"} | ({"model"} if config.init_from else set())  # init_from sets the shape
        changed = sorted(key for key in ours.keys() - ignored if ours[key] != config_there.get(key))
        if changed:
            raise SystemExit(
                f"error: {folder} has a run with other settings ({', '.join(changed)}): remove the folder or use "
                "another --out"
            )
    return config


def check_comparable(configs: Iterable[Config]) -> None:
    """Exit if the configs' validation losses do not measure the same thing."""
    configs = list(configs)
    values_to_match: dict[str, Iterable[object]] = {
        "model": (dataclasses.replace(config.model, dropout=0.0) for config in configs),
        "data.path": (config.data.path for config in configs),
        "data.boundary": (config.data.boundary for config in configs),
        "batch.seq_len": (config.batch.seq_len for config in configs),
        "eval.val_tokens": (config.eval.val_tokens for config in configs),
        "init_from": (config.init_from for config in configs),
    }
    for name, values in values_to_match.items():
        different = sorted({str(value) for value in values})
        if len(different) > 1:
            raise SystemExit(f"error: the runners differ in {name} ({', '.join(different)}): use one value for all")


def train(folder: Path, settings: list[str], launch: str, config: Config) -> bool:
    """Train, unless the run has ended already. Return True if it has all its steps, False if it diverged."""
    if outcome(folder, config) is None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "status.json").unlink(missing_ok=True)  # of an earlier attempt
        command = [sys.executable, "-m", "accelerate.commands.launch", *launch.split(), "train.py", *settings]
        command += ["--seed", str(config.seed), "--output_dir", str(folder), "--resume", "auto"]
        with (folder / "console.log").open("a") as log:
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
    has_finished = outcome(folder, config)
    if has_finished is None:
        raise SystemExit(f"error: {folder}: the run did not finish; see console.log there, then start the race again")
    return has_finished


def outcome(folder: Path, config: Config) -> bool | None:
    """Return True if the run has finished, False if it diverged, otherwise None."""
    path = folder / "status.json"
    status = json.loads(path.read_text())["status"] if path.is_file() else None
    if status == "finished":
        return True
    last = (read_metrics(folder / "metrics.jsonl") or [{}])[-1]
    gave_up = last.get("skipped", {}).get("in_a_row", 0) >= config.optim.max_skipped_steps
    ended_without_loss = last.get("step") == config.max_steps and last.get("val_loss", 0.0) is None
    return False if status == "failed" and (gave_up or ended_without_loss) else None


def validation_curve(records: Iterable[dict[str, Any]], has_finished: bool) -> Curve:
    """Return the evaluations in the records of metrics.jsonl. An infinite loss ends a diverged run's curve."""
    curve, tokens, seconds = [], 0, 0.0
    for record in records:
        tokens = record["tokens"]
        seconds += record.get("ms", 0.0) / 1000
        if "val_loss" in record:
            loss = record["val_loss"]
            curve.append(Point(tokens, seconds, math.inf if loss is None else loss))
    return curve if has_finished else [*curve, Point(tokens, seconds, math.inf)]


def reach(curve: Curve, loss: float) -> Point | None:
    """Return the first point with this loss, on straight lines between evaluations; None if the curve ends above it."""
    if curve[-1].loss > loss:
        return None
    if curve[0].loss <= loss:
        return curve[0]
    before, after = next(pair for pair in itertools.pairwise(curve) if pair[1].loss <= loss)
    share = (before.loss - loss) / (before.loss - after.loss) if math.isfinite(before.loss) else 1.0
    tokens = before.tokens + share * (after.tokens - before.tokens)
    return Point(tokens, before.seconds + share * (after.seconds - before.seconds), loss)


def compare(curves: Curves) -> list[dict[str, Any]]:
    """Compare each runner with the reference.

    Returns:
        One dict per runner: "name", and lists over the seeds. "loss": last one, infinite if the run diverged;
        "difference": loss minus the reference's; "tokens": of the run; "token_ratio" and "time_ratio": what reaching
        the reference's last loss took, divided by the reference's tokens and seconds, None if it was not reached.
    """
    reference = next(iter(curves.values()))
    rows = []
    for name, by_seed in curves.items():
        row: dict[str, Any] = {"name": name, "loss": [], "difference": [], "tokens": []}
        row |= {"token_ratio": [], "time_ratio": []}
        for seed, curve in by_seed.items():
            end, goal = curve[-1], reference[seed][-1]
            reached = goal if by_seed is reference else reach(curve, goal.loss)
            row["loss"].append(end.loss)
            row["difference"].append(end.loss - goal.loss)
            row["tokens"].append(end.tokens)
            row["token_ratio"].append(reached and reached.tokens / goal.tokens)
            row["time_ratio"].append(reached and reached.seconds / goal.seconds)
        rows.append(row)
    return rows


def origin(folder: Path) -> str:
    """Return a run's machine, versions and commit on one line."""
    provenance = json.loads((folder / "provenance.json").read_text())
    hardware, code = provenance["hardware"], provenance["code"] or {}
    machine = f"{hardware['processes']} x {hardware['device']}, {hardware['cpu_count']} cores"
    commit = f"commit {code.get('commit')}{', changed' if code.get('dirty') else ''}"
    return f"{machine}, {hardware['mixed_precision']}, torch {provenance['versions']['torch']}, {commit}"


def format_rows(rows: list[dict[str, Any]]) -> str:
    """Return the Markdown table."""
    above = f"above {rows[0]['name']}'s"
    columns = ("runner", "n", "tokens", "last validation loss", above, "tokens to it", "seconds to it")
    formats = {"loss": ".4f", "difference": ".4f", "token_ratio": ".2f", "time_ratio": ".2f"}
    cells = []
    for row in rows:
        means = (mean(row[key], number_format) for key, number_format in formats.items())
        cells.append([row["name"], len(row["loss"]), f"{max(row['tokens']):,}", *means])
    return table(columns, cells)


def mean(values: Sequence[float | None], number_format: str) -> str:
    """Return "mean ± standard deviation", or how many are missing or infinite."""
    numbers = [value for value in values if value is not None and math.isfinite(value)]
    if len(numbers) < len(values):
        return f"not reached by {len(values) - len(numbers)} of {len(values)}"
    text = f"{statistics.fmean(numbers):{number_format}}"
    return text if len(numbers) == 1 else f"{text} ± {statistics.stdev(numbers):{number_format}}"


def plot(curves: Curves, path: Path) -> None:
    """Plot the losses over tokens and over seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    goal = statistics.fmean(curve[-1].loss for curve in next(iter(curves.values())).values())
    lowest = min(point.loss for by_seed in curves.values() for curve in by_seed.values() for point in curve)
    for axis, column in zip(axes, ("tokens", "seconds"), strict=True):
        for number, (name, by_seed) in enumerate(curves.items()):
            for i, curve in enumerate(by_seed.values()):
                x, y = [getattr(point, column) for point in curve], [point.loss for point in curve]
                axis.plot(x, y, "o-", ms=3, lw=1, alpha=0.7, color=f"C{number % 10}", label=name if i == 0 else None)
        axis.axhline(goal, color="gray", ls="--", lw=1, label=f"the first one's last ({goal:.3f})")
        axis.set(xlabel=f"{column} of training", ylim=(lowest - 0.1, goal + 1.5 * math.log(4)))
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="validation loss, nats per token")
    axes[0].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
