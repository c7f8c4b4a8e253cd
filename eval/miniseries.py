"""Plot scores over model size, as in figure 1 of the GPT-2 paper.

python -m eval.miniseries CHECKPOINT... [--published] [--tasks ...] [--data TASK=PATH ...] [--out FOLDER] ...

Writes miniseries.png with one panel per metric, and miniseries.md with the same numbers as a table. Each CHECKPOINT is
a folder or an id on the Hub, which is scored now, or a .json file from `python -m eval --output`. New results are
written next to the plot as such files. --published adds OpenAI's GPT-2 and GPT-3 where they can be compared.

A .json file may also be the result of a run of benchmarks/race.py, "benchmarks/results/series/*.json" for instance:
then there is a line for each number of training tokens, and law.py's scaling law through the validation losses.
"""

import argparse
import io
import itertools
import json
import logging
import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from common.cli import Parser, prepare_process, run_command, say

if __name__ == "__main__":
    prepare_process()

import numpy as np

from common.checkpoints import resolve_checkpoints
from common.models import check_name, load_tokenizer
from eval import EvalError, command
from eval.evaluator import load_tasks
from eval.law import Fit, fit_law
from eval.lm_eval_bridge import PREFIX
from eval.published import GPT2, GPT3, find_corpus, not_comparable_reason
from eval.task import task_class

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Column: TypeAlias = tuple[str, str]
"""(task, metric)"""
Protocol: TypeAlias = tuple[Any, str, int | None]
"""(version, hash or source of the items, number of items)"""

STYLES = ("o-C0", "s--C3", "^:C2", "D-C1", "v-C4")
OURS = "scored here (± standard error)"
PUBLISHED = ", published"
TRAINING = "training"
"""the task of the validation loss of a run of benchmarks/race.py"""
LOSS, RESIDUAL = (TRAINING, "loss"), (TRAINING, "residual")
LAW_SIZE, LAW_TOKENS = 124_439_808, 10e9
"""the model that the law is asked about: the lecture's"""
TITLES = {
    TRAINING: "validation split of the training text",
    "hellaswag": "HellaSwag",
    "lambada": "LAMBADA",
    "blimp": "BLiMP",
    "core": "CORE",
    "wikitext": "WikiText",
    "bits_per_byte": "validation text",
}
# The windows of published losses, as bits_per_byte describes them: GPT-2's full context, without overlap.
PUBLISHED_WINDOWS = ", validation split, stride 1024, all "


class Row(NamedTuple):
    """A model: a row of the table, and a point in each panel."""

    label: str
    series: str
    """the line that its points are on"""
    parameters: int
    metrics: dict[Column, tuple[float, float | None]]
    """{(task, metric): (value, standard error or None)}, finite values only"""
    tokens: int | None = None
    """of the training, if a run of benchmarks/race.py is known"""

    @property
    def is_ours(self) -> bool:
        """False for a published model."""
        return not self.series.endswith(PUBLISHED)


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m eval.miniseries",
        description="Plot the scores of several models over their size. Several GPUs share the items of each: "
        "accelerate launch -m eval.miniseries ...",
        allow_abbrev=False,
    )
    about = (
        "before the options: a checkpoint folder, a quoted pattern such as 'runs/*/checkpoints/best' or the id of a "
        "model on the Hub, to be scored; or a .json file from `python -m eval --output`. If all are such files, all "
        "their tasks are shown, or only --tasks"
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help=about)
    about = "also show OpenAI's GPT-2 and GPT-3, where they can be compared"
    parser.add_argument("--published", action="store_true", help=about)
    about = "folder for miniseries.png, miniseries.md and a .json file per scored model (default: miniseries)"
    parser.add_argument("--out", type=Path, default=Path("miniseries"), metavar="FOLDER", help=about)
    command.add_task_arguments(parser)
    parser.set_defaults(tasks=None)  # None if the user did not give --tasks
    return parser.parse_args(arguments)


def read_result(path: str | Path) -> dict[str, Any]:
    """Read a result file from `python -m eval --output` or benchmarks/race.py. Raises EvalError for any other file."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        if "losses" in result:
            result = _result_of_run(result)
        _, footnotes = published_rows(result)
        table(rows_of([result]), result, footnotes)  # fails if anything is missing or of another type
        if not result["tasks"] or not all(isinstance(about["figures"], dict) for about in result["tasks"].values()):
            raise ValueError
    except OSError as error:
        raise EvalError(f"{path!r} cannot be read ({error.strerror}); give a file from python -m eval") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise EvalError(
            f"{path!r} is not a result file of `python -m eval --output`; give such a file, or the checkpoint's "
            "folder to score it now"
        ) from error
    return result


def _result_of_run(run: dict[str, Any]) -> dict[str, Any]:
    """Return the scores of a run of benchmarks/race.py, with its validation loss as one of the tasks."""
    tokens, loss = run["losses"][-1]
    data = {"source": "validation split of the training text", "sha256": run["data"]["train_sha256"]}
    figures = {LOSS[1]: "validation loss, nats per token", RESIDUAL[1]: "the loss less that of the fitted law"}
    about = {"version": 1, "data": data | {"is_sample": False}, "figures": figures}
    return {
        "results": {TRAINING: {"loss": loss}, **run["scores"].get("results", {})},
        "tasks": {TRAINING: about | {"full_size": None}, **run["scores"].get("tasks", {})},
        "model": {
            # unique_labels shows only as many of the parts as tell the runs apart.
            "name": f"seed {run['seed']}/{run['recipe']}/{run['size']}, {tokens / 1e6:.3g}M tokens",
            "parameters": run["parameters"],
            **{name: run["settings"]["model"][name] for name in ("n_layer", "n_embd")},
        },
        "tokens": tokens,
        "recipe": run["recipe"],
        "outcome": run["outcome"],
    }


def unique_labels(names: Sequence[str]) -> list[str]:
    """Return a label for each model: the last folders of its name, as many as are needed to tell the models apart.

    The labels stay unique if "/" becomes "-", as in the names of result files.

    Raises:
        EvalError: the same model occurs twice.
    """
    all_parts = [_label_parts(name) for name in names]
    stems: list[str] = []
    for depth in range(1, max(map(len, all_parts)) + 1):
        labels = ["/".join(parts[-depth:]) for parts in all_parts]
        stems = [label.replace("/", "-") for label in labels]
        if len(set(stems)) == len(stems):
            return labels
    duplicate = next(name for i, name in enumerate(names) if stems[i] in stems[:i])
    raise EvalError(f"{duplicate!r} is listed twice; remove one, or change model.name in one of the .json files")


def _label_parts(name: str) -> list[str]:
    """Return the folders of a name, with RUN/checkpoints/step_000100 as one: RUN/step_000100."""
    path = Path(name).absolute() if Path(name).is_dir() else Path(name)
    parts = [part for part in path.parts if part != path.anchor]
    return [*parts[:-3], f"{parts[-3]}/{parts[-1]}"] if parts[-2:-1] == ["checkpoints"] and len(parts) > 2 else parts


def _protocols(result: dict[str, Any]) -> dict[str, Protocol]:
    """Return {task: (version, data, n)}, which must agree between models; n because hashes do not cover windows."""
    return {
        name: (task["version"], task["data"]["sha256"] or task["data"]["source"], result["results"][name].get("n"))
        for name, task in result["tasks"].items()
    }


def _check_same_protocols(protocols: dict[str, dict[str, Protocol]]) -> None:
    """Raise EvalError if two of {model: {task: protocol}} differ in a task."""

    def describe(protocol: Protocol) -> str:
        version, data, n = protocol  # `data` is a hash, or for lm-eval a sentence
        return f"version {version}, {n} items, {data if ' ' in data else data[:9]}"

    first: dict[str, tuple[str, Protocol]] = {}
    for model, model_protocols in protocols.items():
        for task, protocol in model_protocols.items():
            first_model, first_protocol = first.setdefault(task, (model, protocol))
            if protocol != first_protocol:
                raise EvalError(
                    f"{task} of {first_model!r} ({describe(first_protocol)}) and of {model!r} ({describe(protocol)}) "
                    "cannot be compared; score both with the same code, --data, --limit and --stride"
                )


def rows_of(results: Sequence[dict[str, Any]]) -> list[Row]:
    """Return the rows of results of the same tasks (see `read_result`), the smallest model first."""
    rows = []
    for label, result in zip(unique_labels([r["model"]["name"] for r in results]), results, strict=True):
        model = result["model"]
        sizes = [m.name.split()[-1] for m in GPT2 if m.size == (model["n_layer"], model["n_embd"])]
        metrics = {}
        for name, task in result["tasks"].items():
            values = {key: x for key, x in result["results"][name].items() if x is not None and math.isfinite(x)}
            for metric in task["figures"]:
                if metric in values:
                    metrics[name, metric] = values[metric], values.get(f"{metric}_stderr")
        tokens = result.get("tokens")
        series = OURS if tokens is None else f"{tokens / 1e6:.3g}M tokens (± standard error)"
        label = " ".join([label, *(f"({size})" for size in sizes)])
        rows.append(Row(label, series, model["parameters"], metrics, tokens))
    return sorted(rows, key=lambda row: (row.parameters, row.tokens or 0))


def fit_series(rows: Sequence[Row]) -> Fit | None:
    """Fit the scaling law of the runs' validation losses, and add their residuals to the rows; None without a law."""
    trained = [row for row in rows if row.tokens is not None and LOSS in row.metrics]
    fit = fit_law([(row.parameters, row.tokens or 0, row.metrics[LOSS][0]) for row in trained])
    if fit is not None:
        for row, residual in zip(trained, fit.residuals, strict=True):
            row.metrics[RESIDUAL] = (residual, None)
    return fit


def published_rows(result: dict[str, Any]) -> tuple[list[Row], list[str]]:
    """Return rows of OpenAI's models for results with `result`'s items, and footnotes on what cannot be compared."""
    models, footnotes = GPT2 + GPT3, []
    rows = [Row(f"{m.name} (published)", f"{m.name.rpartition(' ')[0]}{PUBLISHED}", m.parameters, {}) for m in models]
    for name, task in result["tasks"].items():
        if name == TRAINING:
            continue
        source = task["data"]["source"]
        reason = not_comparable_reason(task["data"], result["results"][name].get("n"), task["full_size"])
        published = [m.results.get(name, {}) for m in models]
        if name == "bits_per_byte":
            corpus = find_corpus(source)
            published = [{"loss": m.losses[corpus]} if corpus in m.losses else {} for m in models]
        if not any(published):
            footnotes.append(f"{name}: no published results are known for {source}.")
        elif reason is not None:
            footnotes.append(f"{name}: {reason}.")
        elif name == "bits_per_byte" and PUBLISHED_WINDOWS not in source:
            footnotes.append(
                f"{name}: published losses need the full validation split (shards, no --limit) and --stride 1024."
            )
        else:
            for row, metrics in zip(rows, published, strict=True):
                row.metrics.update({(name, metric): (value, None) for metric, value in metrics.items()})
            if name == "bits_per_byte":
                footnotes.append(
                    f"{name}: published losses are for {corpus} too, but for other validation splits of it."
                )
    return [row for row in rows if row.metrics], footnotes


def _columns(rows: Sequence[Row]) -> list[Column]:
    """Return the (task, metric) of our models; a column of only published numbers would compare nothing."""
    columns = dict.fromkeys(column for row in rows if row.is_ours for column in row.metrics)
    return sorted(columns, key=lambda column: column[0] != TRAINING)


def table(rows: Sequence[Row], result: dict[str, Any], footnotes: Sequence[str] = ()) -> str:
    """Return Markdown: a row per model, then the items, the metrics and the footnotes. See `draw` for arguments."""
    columns = _columns(rows)
    lines = [("model", "parameters", *map(" ".join, columns)), ("---", *["---:"] * (len(columns) + 1))]
    for row in rows:
        numbers = [[f"{x:.4f}" for x in row.metrics.get(column, ()) if x is not None] for column in columns]
        lines.append((row.label, f"{row.parameters:,}", *map(" ± ".join, numbers)))
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + "\n"
    for name, task in result["tasks"].items():
        digest = (task["data"]["sha256"] or "unknown")[:12]
        text += f"- {name}: {task['data']['source']} (version {task['version']}, sha256 {digest})\n"
        text += "".join(f"    - {metric}: {task['figures'][metric]}\n" for of, metric in columns if of == name)
    return text + "".join(f"- {footnote}\n" for footnote in footnotes)


def draw(rows: Sequence[Row], result: dict[str, Any], fit: Fit | None = None) -> "Figure":
    """Return a matplotlib Figure with a panel per metric, and in each a line per series.

    With runs of several numbers of tokens, only each task's main metric has a panel, and models have no labels.

    Args:
        rows: those of `rows_of` and `published_rows`.
        result: any of the results, for the titles.
        fit: of the runs' losses, see `fit_series`.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    columns = _columns(rows)
    is_series = any(row.tokens is not None for row in rows)
    if is_series:
        columns = [
            (task, metric) for task, metric in columns if task == TRAINING or metric == main_metric(task, result)
        ]
    width = len(columns) if len(columns) <= 3 else math.ceil(math.sqrt(len(columns)))
    height = math.ceil(len(columns) / width)
    figure = Figure(figsize=(5.6 * width, 4.6 * height + 0.4), dpi=120, layout="constrained", facecolor="white")
    panels = figure.subplots(height, width, squeeze=False).ravel()
    legend = {}
    all_series = dict.fromkeys(row.series for row in sorted(rows, key=lambda row: (not row.is_ours, row.tokens or 0)))
    for axes, column in zip(panels, columns, strict=False):
        for series, style in zip(all_series, itertools.cycle(STYLES)):
            if own := [row for row in rows if row.series == series and column in row.metrics]:
                values, errors = zip(*(row.metrics[column] for row in own), strict=True)
                yerr = [error or 0.0 for error in errors] if any(errors) else None
                x = [row.parameters / 1e6 for row in own]
                legend[series] = axes.errorbar(x, values, yerr=yerr, fmt=style, ms=5, lw=1.2, capsize=3, label=series)
        name, metric = column
        task, n = result["tasks"][name], result["results"][name].get("n")
        title = f"{'own sample items, not ' if task['data']['is_sample'] else ''}{TITLES.get(name, name)}"
        title += f": {n:,} {'windows' if name == 'bits_per_byte' else 'items'}" if n else ""
        axes.set_title(f"{title}\n{textwrap.fill(task['figures'][metric], 80)}", fontsize=8.5)
        axes.set(xscale="log", xlabel="parameters, millions", ylabel=metric)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.minorticks_off()
        axes.margins(0.15)
        axes.grid(alpha=0.3)
    for axes in panels[len(columns) :]:
        axes.set_visible(False)
    if fit is not None:
        sizes = [row.parameters for row in rows if row.tokens is not None]
        for tokens in sorted({row.tokens for row in rows if row.tokens is not None}):
            grid = np.geomspace(min(sizes), max(sizes))
            losses = [fit.law.loss(size, tokens) for size in grid]
            [legend["fitted law"]] = panels[columns.index(LOSS)].plot(grid / 1e6, losses, "k:", lw=0.8)
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=3, frameon=False)
    figure.draw_without_rendering()  # fixes the panels' positions, which placing the labels needs
    if not is_series:
        for axes, column in zip(panels, columns, strict=False):
            _label_points(axes, [row for row in rows if row.series == OURS and column in row.metrics], column)
    return figure


def main_metric(task: str, result: dict[str, Any]) -> str:
    """Return the metric of a result's task that a picture shows, if it shows one."""
    figures = result["tasks"][task]["figures"]
    main = None if task.startswith(PREFIX) else task_class(task).main_metric
    return main if main is not None and main in figures else str(next(iter(figures)))


def _label_points(axes: "Axes", rows: Sequence[Row], column: Column) -> None:
    """Write each model's label in the free place that is nearest to its point."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    taken = []  # in pixels, at first what the lines cover
    for line in axes.get_lines():
        path = line.get_transform().transform_path(line.get_path()).interpolated(30)
        taken += [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in np.asarray(path.vertices)]
    points = [(row.parameters / 1e6, row.metrics[column][0]) for row in rows]
    distances = range(-400, 401, 8)
    offsets = sorted(itertools.product(distances, distances), key=lambda offset: math.hypot(*offset))
    arrow = {"arrowstyle": "-", "lw": 0.5, "color": "C0"}
    style: dict[str, Any] = {"fontsize": 7, "color": "C0", "ha": "center", "va": "center", "arrowprops": arrow}
    for row, point, center in zip(rows, points, axes.transData.transform(points), strict=True):
        label = row.label.replace("/", "\n").replace(" (", "\n(")
        text = axes.annotate(label, point, (0, 0), textcoords="offset pixels", **style)
        text.set_in_layout(False)
        width, height = Text.get_window_extent(text).padded(2).size  # without the arrow
        box = Bbox.from_bounds(center[0] - width / 2, center[1] - height / 2, width, height)
        for offset in offsets:
            place = box.translated(*offset)
            if axes.bbox.contains(*place.p0) and axes.bbox.contains(*place.p1) and not place.count_overlaps(taken):
                text.set_position(offset)
                taken.append(place)
                break


def _main(arguments: Sequence[str] | None) -> None:
    args = _parse_arguments(arguments)
    args.checkpoints = resolve_checkpoints(args.checkpoints)
    results = {n: read_result(n) for n in args.checkpoints if n.endswith(".json") and not Path(n).is_dir()}
    if diverged := [name for name, result in results.items() if result.get("outcome") == "diverged"]:
        if len(diverged) == len(args.checkpoints):
            raise EvalError("all of these runs diverged: there is nothing to compare")
        say(f"left out, since these runs diverged: {', '.join(diverged)}")
        args.checkpoints = [name for name in args.checkpoints if name not in diverged]
        results = {name: result for name, result in results.items() if name not in diverged}
    if len(recipes := {result["recipe"] for result in results.values() if "recipe" in result}) > 1:
        raise EvalError(f"runs of {len(recipes)} recipes ({', '.join(sorted(recipes))}): give those of one recipe")
    to_score = [name for name in args.checkpoints if name not in results]
    if to_score:
        shown = args.tasks = args.tasks or ["hellaswag"]
        tasks = command.tasks_of(args)
    else:
        shown = args.tasks or [name for result in results.values() for name in result["tasks"]]
        for option in ("data", "limit", "stride"):
            if getattr(args, option) not in (None, []):
                raise EvalError(f"--{option}: all inputs are results, so nothing is scored; leave it out")
    for path, result in results.items():
        if missing := [name for name in shown if name not in result["tasks"]]:
            raise EvalError(f"{path!r} has no {missing[0]}; score that model on it too, or choose other --tasks")
        result["tasks"] = {name: result["tasks"][name] for name in shown}
    for name in to_score:
        check_name(name)
    labels = unique_labels([results[name]["model"]["name"] if name in results else name for name in args.checkpoints])
    device, is_main_process = command.join_processes(args.device)
    opened = {name: load_tokenizer(name, trust_remote_code=args.trust_remote_code) for name in to_score}
    # Load all items first, so that errors in them are found before anything is scored.
    loaded = {name: load_tasks(tasks, *opened[name]) for name in to_score}
    protocols = {path: _protocols(result) for path, result in results.items()}
    for name in to_score:
        own = [task for task in loaded[name] if task.items]  # lm-eval's are known only after scoring
        protocols[name] = {task.name: (task.task.version, task.data.sha256, len(task.items)) for task in own}
    _check_same_protocols(protocols)
    if is_main_process:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvalError(f"--out {str(args.out)!r} cannot be created ({error.strerror}); choose another") from error
        command.check_output("--out", args.out / "miniseries.md")

    for name, label in zip(args.checkpoints, labels, strict=True):
        if name in to_score:
            tokenizer, _ = opened[name]
            results[name] = command.score_checkpoint(args, name, tokenizer, loaded.pop(name), device)
            if is_main_process:
                command.write_json("--out", args.out / f"{label.replace('/', '-')}.json", results[name])
    _check_same_protocols({name: _protocols(result) for name, result in results.items()})
    if not is_main_process:
        return
    first_result = next(iter(results.values()))  # the items and metrics are the same in all
    rows, footnotes = rows_of([*results.values()]), list[str]()
    if not _columns(rows):
        raise EvalError(f"{', '.join(args.checkpoints)}: no metric is a finite number; score these models again")
    if args.published:
        published, footnotes = published_rows(first_result)
        rows += published
    fit = fit_series(rows)
    text, plot = table(rows, first_result, footnotes), io.BytesIO()
    if fit is not None:
        text += "".join(f"- {line}\n" for line in fit.describe(LAW_SIZE, LAW_TOKENS))
    draw(rows, first_result, fit).savefig(plot, format="png")
    command.write_output("--out", args.out / "miniseries.md", text)
    command.write_output("--out", args.out / "miniseries.png", plot.getvalue())
    print(f"{text}\nwritten: {args.out / 'miniseries.md'}, {args.out / 'miniseries.png'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 2 for an error that the user can fix, on one line of stderr."""
    stopped = "interrupted; the models scored so far have a .json in --out, which can be given in their place"
    return run_command(_main, arguments, on_interrupt=stopped)


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # of the libraries, as in python -m eval
    sys.exit(main())
