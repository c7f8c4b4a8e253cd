"""Train models of several sizes by several recipes, and compare what each recipe needs to reach a validation loss.

    python -m benchmarks.race benchmarks/races/adamw_7m.yaml
    python -m benchmarks.race benchmarks/races/adamw_7m.yaml --plan        what is left, and how long it takes

A plan is a YAML file. Settings are train.py's, by dotted name; a recipe's go over its size's, and those over the
common ones:

    settings: {data.path: shards/prose, batch.tokens_per_step: 4096, warmup: 0.1}
    sizes: {7M: {model.n_layer: 6, model.n_embd: 256, tokens: 6.0e+6}}
    seeds: [1, 2, 3]
    recipes:
      adamw: {optim.lr: 2.0e-3}                                 # the first one is the reference
      fast: {optim.muon_lr: 0.02, shares: [0.4, 0.5, 0.6]}      # three runs, with these shares of the tokens

`tokens` and `warmup`, a fraction of the steps, take the place of max_steps and optim.warmup_steps, and `scores: {TASK:
DATA}` scores each run's last checkpoint by `python -m eval`. Runs with the same seed see the same batches, if these
have the same size.

A run's result is one file in benchmarks/results/PLAN/. Runs whose file has their settings and their data are not
trained again, interrupted runs are resumed, and a run that diverges has an infinite loss. Prints a table for each size,
and draws PLAN.png. "last validation loss" is the mean ± the standard deviation over the seeds; the intervals of
"above", "tokens to it" and the picture are Student's, at 95%. "tokens to it": the share of the reference's tokens at
which a recipe with `shares`, each run with its own schedule, ends with the reference's last loss, between two shares on
a line in log tokens.
"""

import itertools
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import make_parser
from benchmarks.runs import ROOT, Run, Trainer, code_fingerprint, label, read_plan
from common.cli import run_command
from common.errors import UserError
from common.files import atomic_write
from common.markdown import table
from data.manifest import open_split
from training.estimate import format_duration

Runs = dict[int, dict[str, Any]]  # results by seed
Results = dict[str, dict[str, Runs]]  # by size, and by recipe with its share
# Student's t, 97.5%, by the number of seeds.
_STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
_COLUMNS = ("recipe", "n", "tokens", "last validation loss", "above", "tokens to it", "FLOPs", "s per 1M tokens")


class Interval(NamedTuple):
    """A mean over seeds, and half of its 95% interval, NaN for one seed."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:.4f}" if math.isnan(self.half) else f"{self.mean:.4f} ± {self.half:.4f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; see `common.cli.run_command`."""
    return run_command(_main, argv, on_interrupt="interrupted: run the same command to resume")


def _main(argv: Sequence[str] | None) -> None:
    """Train the runs of a plan that have no result yet, and compare all."""
    parser = make_parser(__doc__)
    parser.add_argument("plan_file", type=Path, metavar="PLAN")
    parser.add_argument("--plan", action="store_true", help="say what is left to train, and stop")
    parser.add_argument("--table", action="store_true", help="train nothing: compare the results that are there")
    parser.add_argument("--out", type=Path, default=Path("runs/race"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="folder of the results (default: benchmarks/results/PLAN)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (default: %(default)s)")
    parser.add_argument("--launch", default="", help="options of `accelerate launch`, in one argument")
    args = parser.parse_args(argv)
    plan = read_plan(args.plan_file)
    if (num_seeds := len({run.seed for run in plan.runs})) > max(_STUDENT):
        raise UserError(f"{args.plan_file}: {num_seeds} seeds, and intervals are known for {max(_STUDENT)}: use fewer")
    folder = args.results or ROOT / "benchmarks" / "results" / plan.name
    trainer = Trainer(folder, args.out, args.jobs, args.launch.split(), plan.scores)
    done = {run.name: result for run in plan.runs if (result := trainer.result(run)) is not None}
    left = [run for run in plan.runs if run.name not in done]
    if args.plan and not left:
        print(f"{len(done)} runs, all of them done")
        return
    if left and not args.table:
        for shards in {run.settings["data.path"] for run in left}:
            open_split(shards, "train")  # an error about the data here, and not in the log of the first run
        print_plan(trainer, left, len(done), args.jobs)
        if args.plan:
            return
        for run, result in trainer.train_all(left):
            done[run.name] = result
            tokens, loss = result["losses"][-1]
            print(f"{run.name:<40} {loss:.4f} after {tokens:,} tokens in {result['seconds']:,.0f} s", flush=True)
    if not done:
        raise UserError(f"{folder}: no results there; leave out --table to train")
    results = collect(plan.runs, done)
    warn_of_differences([*done.values()])
    for size, by_recipe in results.items():
        print(f"\n{size}: {next(iter(next(iter(by_recipe.values())).values()))['parameters']:,} parameters\n")
        print(table(_COLUMNS, compare(by_recipe, plan.runs[0])))
    draw(results, plan.runs[0], folder.with_suffix(".png"))


def print_plan(trainer: Trainer, left: Sequence[Run], num_done: int, num_jobs: int) -> None:
    """Print how many runs are left, and how long they take at the rate of each size's first steps."""
    print(f"{num_done + len(left)} runs, {num_done} of them done; at the rate of the first steps:", flush=True)
    total = 0.0
    for size in dict.fromkeys(run.size for run in left):
        of_size = [run for run in left if run.size == size]
        tokens = sum(run.settings["max_steps"] * run.settings["batch.tokens_per_step"] for run in of_size)
        rate = num_jobs * trainer.rate(of_size[0])
        total += tokens / rate
        print(
            f"  {size}: {len(of_size)} runs, {tokens:,} tokens, {rate:,.0f} tokens/s: {format_duration(tokens / rate)}"
        )
    print(f"  together {format_duration(total)}, without evaluations and start-up", flush=True)


def collect(runs: Sequence[Run], done: dict[str, dict[str, Any]]) -> Results:
    """Return the results by size, recipe and seed, in the order of the plan."""
    results: Results = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        if run.name in done:
            results[run.size][label(run.recipe, run.share)][run.seed] = done[run.name]
    return results


def last_loss(result: dict[str, Any]) -> float:
    """Return a run's last validation loss, infinite if it diverged."""
    loss = result["losses"][-1][1]
    return math.inf if loss is None or result["outcome"] == "diverged" else loss


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of values and half of its 95% interval."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return Interval(sum(values) / len(values), math.nan)
    return Interval(statistics.fmean(values), _STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values)))


def compare(by_recipe: dict[str, Runs], reference: Run) -> list[list[str]]:
    """Return a row of the table per recipe; differences and ratios are between runs of the same seed.

    Args:
        reference: the plan's first run. Without results of its recipe, nothing is compared with it.
    """
    of_reference = by_recipe.get(label(reference.recipe, reference.share), {})
    rows = []
    for name, by_seed in by_recipe.items():
        first = next(iter(by_seed.values()))
        losses = [last_loss(result) for result in by_seed.values()]
        deviation = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 and all(map(math.isfinite, losses)) else ""
        paired = [last_loss(by_seed[seed]) - last_loss(of_reference[seed]) for seed in by_seed if seed in of_reference]
        rows.append(
            [
                name,
                str(len(by_seed)),
                f"{first['losses'][-1][0]:,}",
                f"{statistics.fmean(losses):.4f}{deviation}",
                str(interval(paired)) if by_seed is not of_reference and paired else "",
                "",
                f"{first['flops']:.2e}",
                f"{statistics.median(r['seconds'] / r['losses'][-1][0] for r in by_seed.values()) * 1e6:.0f}",
            ]
        )
        shares = [runs for runs in by_recipe.values() if next(iter(runs.values()))["recipe"] == first["recipe"]]
        if len(shares) > 1 and first["recipe"] != reference.recipe and by_seed is shares[-1]:  # in the last share's row
            rows[-1][5] = describe_crossing(crossing(of_reference, shares))
    return rows


def crossing(reference: Runs, shares: Sequence[Runs]) -> list[float]:
    """Return for each seed the share of the reference's tokens with which a recipe ends at the reference's last loss.

    NaN for a seed whose shares do not enclose that loss: nothing is extrapolated. Seeds without runs are left out.
    """
    result = []
    for seed, goal in reference.items():
        points = sorted(
            (math.log(runs[seed]["losses"][-1][0] / goal["losses"][-1][0]), last_loss(runs[seed]))
            for runs in shares
            if seed in runs
        )
        share = math.nan
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            if y0 >= last_loss(goal) >= y1 and y0 > y1:
                share = math.exp(x0 + (x1 - x0) * (y0 - last_loss(goal)) / (y0 - y1))
        if points:
            result.append(share)
    return result


def describe_crossing(shares: Sequence[float]) -> str:
    """Return the mean share with its interval, or how many seeds have none between their shares."""
    if not shares:
        return ""
    missing = sum(map(math.isnan, shares))
    return str(interval(shares)) if not missing else f"not between the shares for {missing} of {len(shares)}"


def warn_of_differences(results: Sequence[dict[str, Any]]) -> None:
    """Say if the results have different data, machines or sources."""
    for name, values in {
        "the data": {result["data"]["train_sha256"] for result in results},
        "the machine": {result["machine"] for result in results},
        "the code (or it has changed since)": {result["code"]["sha256"] for result in results} | {code_fingerprint()},
    }.items():
        if len(values) > 1:
            print(f"warning: the runs differ in {name}: {', '.join(sorted(map(str, values)))}")


def draw(results: Results, reference: Run, path: Path) -> None:
    """Draw for each size the validation loss over tokens, and the last losses with their intervals."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(7 * len(results), 5), layout="constrained")
    for axes, (size, by_recipe) in zip(
        figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True
    ):
        recipes = list(dict.fromkeys(next(iter(runs.values()))["recipe"] for runs in by_recipe.values()))
        ends = {}
        for name, by_seed in by_recipe.items():
            first = next(iter(by_seed.values()))
            color = f"C{recipes.index(first['recipe']) % 10}"
            for result in by_seed.values():
                tokens, losses = zip(*((t, loss) for t, loss in result["losses"] if loss is not None), strict=True)
                axes.plot(tokens, losses, color=color, lw=0.7, alpha=0.5)
            end = interval([last_loss(result) for result in by_seed.values()])
            ends[name] = end.mean
            axes.errorbar(tokens[-1], end.mean, yerr=end.half, fmt="o", color=color, ms=4, capsize=3)
        for index, recipe in enumerate(recipes):
            axes.plot([], [], "o-", color=f"C{index % 10}", label=recipe)
        finite = [end for end in ends.values() if math.isfinite(end)]
        axes.axhline(ends.get(label(reference.recipe, reference.share), math.nan), color="gray", ls="--", lw=1)
        axes.set(
            title=size,
            xlabel="training tokens",
            ylabel="validation loss, nats per token",
            ylim=(min(finite) - 0.05, max(finite) + 0.8) if finite else None,
        )
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as tmp_path:
        figure.savefig(tmp_path, format="png", dpi=110)


if __name__ == "__main__":
    sys.exit(main())
