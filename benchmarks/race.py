"""
Trains the same model by several recipes, several seeds each, and says how many tokens and seconds each needs for the
validation loss that the first one ends with.

    python benchmarks/race.py adamw=recipes/gpt2_124m.yaml fast=recipes/gpt2_124m_fast.yaml --out runs/race
    python benchmarks/race.py adamw=benchmarks/race_small.yaml fast=benchmarks/race_small_fast.yaml \\
        wd0=benchmarks/race_small_fast.yaml,optim.muon_weight_decay=0 --seeds 1 2 3 --out runs/race_small

NAME=RECIPE[,SETTING=VALUE...] is a runner; with the same seed all see the same batches, where these are of one size.
Each run is `accelerate launch train.py`, one after the other: a seed's runners in turn, so that a slow hour of the
machine falls on all of them. What is finished or has diverged is not run again, what was interrupted goes on; a folder
with a run of other settings is an error. A run that diverges has not reached anything; one that stops for another
reason stops the race.

Writes into --out: a folder a run (NAME/SEED), race.json, race.png (loss over tokens and over seconds of training), and
prints a Markdown table: mean and standard deviation over the seeds; ratios are of the same seed's runs, read off on
straight lines between evaluations: no better than these are close. Seconds are those of the steps, the first one's
compiling among them, without evaluations and saving.
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
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # `training` is not installed

from common.files import finite  # noqa: E402
from common.metrics import read_metrics  # noqa: E402
from training import TrainingError  # noqa: E402
from training.config import load_config  # noqa: E402


def main():
    args = parse_args()
    folder_of = {(name, seed): Path(args.out) / name / str(seed) for seed in args.seeds for name in args.runners}
    configs = {folder: check(folder, args.runners[name], seed) for (name, seed), folder in folder_of.items()}
    check_comparable(configs.values())  # all of them, before hours go into the first
    curves = {name: {} for name in args.runners}
    for (name, seed), folder in folder_of.items():
        is_finished = train(folder, args.runners[name], seed, args.launch, configs[folder].optim.max_skipped_steps)
        curves[name][seed] = curve = validation_curve(read_metrics(folder / "metrics.jsonl"), is_finished)
        tokens, seconds, loss = curve[-1]
        print(f"{name} {seed}: {loss:.4f} after {tokens:,} tokens, {seconds:,.0f} s of training", flush=True)
        if curves[name] is next(iter(curves.values())) and not math.isfinite(loss):
            raise SystemExit(f"{folder}: the reference has no last loss to race for; see its console.log")
    made_by = {origin(folder) for folder in folder_of.values()}
    if len(made_by) > 1:
        print("\nwarning: these runs are not of one machine and one code:", *sorted(made_by), sep="\n    ")
    rows = compare(curves)
    (Path(args.out) / "race.json").write_text(json.dumps(finite({"curves": curves, "rows": rows}), indent=1) + "\n")
    draw(curves, Path(args.out) / "race.png")
    print(table(rows))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runners", nargs="+", metavar="NAME=RECIPE[,SETTING=VALUE...]", help="the first is the reference"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1337, 1338, 1339])
    parser.add_argument("--out", required=True, help="folder for the runs and what comes of them")
    parser.add_argument("--launch", default="", help="options of `accelerate launch`, in one argument")
    args = parser.parse_args()
    runners = {}
    for runner in args.runners:
        name, _, rest = runner.partition("=")
        recipe, *settings = re.split(r",(?![^\[{]*[\]}])", rest)  # not at the commas of a list
        if not Path(recipe).is_file():
            parser.error(f"{runner}: there is no recipe {recipe!r}")
        if name in runners:
            parser.error(f"two runners are named {name!r}")
        pairs = (setting.partition("=") for setting in settings)
        settings = [part for key, _, value in pairs for part in (f"--{key}", value)]
        runners[name] = ["--config", str(Path(recipe).resolve()), *settings]
    args.runners = runners
    return args


def check(folder, settings, seed):
    """The Config; ends with an error where it cannot be, or is not that of the run that the folder has."""
    try:
        config = load_config([*settings, "--seed", str(seed)])
    except TrainingError as error:
        raise SystemExit(f"error: {folder}: {error}") from None
    path = folder / "provenance.json"
    if not path.is_file():
        return config
    wanted = json.loads(json.dumps(dataclasses.asdict(config)))
    found = json.loads(path.read_text())["config"]
    not_compared = {"output_dir", "resume"} | ({"model"} if config.init_from else set())  # the shape is then another's
    changed = sorted(key for key in wanted.keys() - not_compared if wanted[key] != found.get(key))
    if changed:
        raise SystemExit(
            f"error: {folder} has a run with other settings ({', '.join(changed)}): remove it, or take another --out"
        )
    return config


def check_comparable(configs):
    """Ends with an error where losses of two runs would not be losses of the same thing."""
    for name, value_of in {
        "model": lambda config: dataclasses.replace(config.model, dropout=0.0),
        "data.path": lambda config: config.data.path,
        "data.boundary": lambda config: config.data.boundary,
        "batch.seq_len": lambda config: config.batch.seq_len,
        "eval.val_tokens": lambda config: config.eval.val_tokens,
        "init_from": lambda config: config.init_from,
    }.items():
        values = {str(value_of(config)) for config in configs}
        if len(values) > 1:
            raise SystemExit(f"error: the runners differ in {name}: {', '.join(sorted(values))}")


def origin(folder):
    """What a run was made by, on one line."""
    made = json.loads((folder / "provenance.json").read_text())
    hardware, code = made["hardware"], made["code"] or {}
    machine = f"{hardware['processes']} x {hardware['device']}, {hardware['cpu_count']} cores"
    commit = f"commit {code.get('commit')}{', changed' if code.get('dirty') else ''}"
    return f"{machine}, {hardware['mixed_precision']}, torch {made['versions']['torch']}, {commit}"


def train(folder, settings, seed, launch, max_skipped_steps):
    """Whether the run came to its end; if not, it has diverged."""
    path = folder / "status.json"

    def outcome():
        status = json.loads(path.read_text())["status"] if path.is_file() else None
        last = (read_metrics(folder / "metrics.jsonl") or [{}])[-1]
        gave_up = last.get("skipped", {}).get("in_a_row", 0) >= max_skipped_steps
        return "diverged" if status == "failed" and gave_up else status

    if outcome() not in ("finished", "diverged"):
        folder.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # what it says is of an earlier attempt
        command = [sys.executable, "-m", "accelerate.commands.launch", *launch.split(), "train.py", *settings]
        command += ["--seed", str(seed), "--output_dir", str(folder.resolve()), "--resume", "auto"]
        with (folder / "console.log").open("a") as log:
            subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    if outcome() not in ("finished", "diverged"):
        raise SystemExit(f"{folder} did not come to its end: see console.log there, and run this again")
    return outcome() == "finished"


def validation_curve(records, is_finished):
    """
    [[tokens, seconds of training, validation loss]] of a run's evaluations, which take no time here. A loss that was
    not finite, and what a run that diverged would have come to, is infinite.
    """
    curve, seconds = [], 0.0
    for record in records:
        seconds += record.get("ms", 0.0) / 1000
        if "val_loss" in record:
            loss = record["val_loss"]
            curve.append([record["tokens"], seconds, math.inf if loss is None else loss])
    if not is_finished:
        curve.append([records[-1]["tokens"] if records else 0, seconds, math.inf])
    return curve


def needed(curve, loss):
    """
    (tokens, seconds) when a curve comes down to a loss, on straight lines between evaluations; None where it does not,
    or ends above it.
    """
    if curve[-1][2] > loss:
        return None
    if curve[0][2] <= loss:
        return tuple(curve[0][:2])
    (tokens, seconds, higher), (later_tokens, later_seconds, lower) = next(
        (before, after) for before, after in itertools.pairwise(curve) if after[2] <= loss
    )
    share = (higher - loss) / (higher - lower) if math.isfinite(higher) else 1.0
    return tokens + share * (later_tokens - tokens), seconds + share * (later_seconds - seconds)


def compare(curves):
    """
    Args:
        curves: {name: {seed: validation_curve}}, the reference first.

    Returns:
        list of {"name", "loss", "difference", "tokens", "token_ratio", "time_ratio"}, each a list over the seeds; the
        loss is the last one, infinite where the run diverged; the difference is what it has above the reference's of
        the same seed; the ratios are to the reference's whole run, None where its last loss was not reached for good.
    """
    reference = next(iter(curves.values()))
    rows = []
    for name, by_seed in curves.items():
        ratios = []
        for seed, curve in by_seed.items():
            tokens, seconds, loss = reference[seed][-1]
            reached = (tokens, seconds) if by_seed is reference else needed(curve, loss)
            ratios.append((None, None) if reached is None else (reached[0] / tokens, reached[1] / seconds))
        rows.append(
            {
                "name": name,
                "loss": [curve[-1][2] for curve in by_seed.values()],
                "difference": [curve[-1][2] - reference[seed][-1][2] for seed, curve in by_seed.items()],
                "tokens": [curve[-1][0] for curve in by_seed.values()],
                "token_ratio": [of_tokens for of_tokens, _ in ratios],
                "time_ratio": [of_time for _, of_time in ratios],
            }
        )
    return rows


def table(rows):
    reference = rows[0]["name"]
    lines = [
        "",
        f"| runner | n | tokens | last validation loss | above {reference}'s | tokens to it | seconds to it |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["name"], len(row["loss"]), f"{max(row['tokens']):,}"]
        cells += [shown(row[key], "{:.4f}") for key in ("loss", "difference")]
        cells += [shown(row[key], "{:.2f}") for key in ("token_ratio", "time_ratio")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def shown(values, number_format):
    """Mean ± standard deviation; how many did not get there, if any."""
    there = [value for value in values if value is not None and math.isfinite(value)]
    if len(there) < len(values):
        return f"not reached by {len(values) - len(there)} of {len(values)}"
    mean = number_format.format(statistics.fmean(there))
    return mean if len(there) == 1 else f"{mean} ± {number_format.format(statistics.stdev(there))}"


def draw(curves, path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    goal = statistics.fmean(curve[-1][2] for curve in next(iter(curves.values())).values())
    lowest = min(point[2] for by_seed in curves.values() for curve in by_seed.values() for point in curve)
    for column, (axis, label) in enumerate(zip(axes, ("training tokens", "seconds of training"), strict=True)):
        for number, (name, by_seed) in enumerate(curves.items()):
            for seed, curve in by_seed.items():
                axis.plot(
                    [point[column] for point in curve],
                    [point[2] for point in curve],
                    "o-",
                    ms=3,
                    lw=1,
                    alpha=0.7,
                    color=f"C{number % 10}",
                    label=name if seed == next(iter(by_seed)) else None,
                )
        axis.axhline(goal, color="gray", ls="--", lw=1, label=f"the first one's last ({goal:.3f})")
        axis.set(xlabel=label, ylim=(lowest - 0.1, goal + 1.5 * math.log(4)))
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="validation loss, nats a token")
    axes[0].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
