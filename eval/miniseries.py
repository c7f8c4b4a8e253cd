"""
python -m eval.miniseries CHECKPOINT... [--published] [--tasks ...] [--data TASK=PATH ...] [--out FOLDER] ...

Scores over model size, as in figure 1 of the GPT-2 paper: miniseries.png, a panel a figure, and miniseries.md, the same
numbers as a table. Each CHECKPOINT is a folder or an id on the Hub, which is scored now, or a .json file that
`python -m eval --output` wrote, whose numbers are taken. What is scored is written beside the picture as such a file,
in the place of an older one. --published adds OpenAI's GPT-2 and GPT-3 where they can be compared.
"""

import itertools
import json
import logging
import math
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

from common.cli import Parser, prepare_process

if __name__ == "__main__":
    prepare_process()

import numpy as np

from common.checkpoints import resolve_checkpoints
from eval import EvalError, command
from eval.checkpoint import check_name, load_tokenizer
from eval.evaluator import prepare
from eval.published import GPT2, GPT3, text_of, why_not_comparable

OURS = "scored here (± standard error)"
TITLES = {"hellaswag": "HellaSwag", "lambada": "LAMBADA", "bits_per_byte": "validation text"}
# What losses were published of, in the words of bits_per_byte: windows of GPT-2's whole context, side by side.
PUBLISHED_WINDOWS = ", validation split, stride 1024, all "


class Row(NamedTuple):
    """A model: a row of the table, a point in each panel."""

    label: str
    series: str
    """the line that its points are on"""
    parameters: int
    figures: dict
    """{(task, figure): (value, standard error or None)} of those that are known and finite"""


def _parse_arguments(arguments):
    parser = Parser(
        prog="python -m eval.miniseries",
        description="Draws the scores of several models over their size. Several GPUs share the items of each: "
        "accelerate launch -m eval.miniseries ...",
        allow_abbrev=False,
    )
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="before the options: a checkpoint folder or the id of a model on the Hub, to be scored, or a quoted "
        "pattern such as 'runs/*/checkpoints/best'; or a .json file "
        "of `python -m eval --output`. If all are such files, what they have is shown, or --tasks of it",
    )
    parser.add_argument(
        "--published", action="store_true", help="show OpenAI's GPT-2 and GPT-3 too, where they can be compared"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("miniseries"),
        metavar="FOLDER",
        help="for miniseries.png, miniseries.md and a .json of each model that is scored (default: miniseries)",
    )
    command.add_task_arguments(parser)
    parser.set_defaults(tasks=None)  # so that it shows whether they were asked for
    return parser.parse_args(arguments)


def read_result(path):
    """
    Args:
        path: of a file that `python -m eval --output` wrote.

    Returns:
        dict: what `eval.evaluate` gives, and the model's name.

    Raises:
        EvalError: it is not there, or something else.
    """
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        model, tasks = result["model"], result["tasks"]
        is_good = bool(tasks) and isinstance(model["name"], str) and model["parameters"] >= 1
        is_good &= {"n_layer", "n_embd"} <= set(model)
        for task, about in tasks.items():
            figures = result["results"][task]
            is_good &= all(isinstance(value, int | float | None) for value in figures.values())
            is_good &= about["full_size"] is None or isinstance(figures["n"], int)
            is_good &= "version" in about and {"source", "sha256", "is_sample"} <= set(about["data"])
            is_good &= all(isinstance(what, str) for what in about["figures"].values())
    except OSError as error:
        raise EvalError(f"{path!r} cannot be read ({error.strerror}); name a file of python -m eval") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_good = False
    if not is_good:
        raise EvalError(
            f"{path!r} is no file that `python -m eval --output` writes; name such a file, or the folder of the "
            "checkpoint to score it now"
        )
    return result


def labels_of(names):
    """
    What tells models apart: of each name the last folders, as many as it takes.

    Args:
        names: list of str, folders or ids on the Hub.

    Returns:
        list of str; no two are the same, even with "-" in the place of "/", which makes them names of files.

    Raises:
        EvalError: two are the same model.
    """
    paths = [Path(name).absolute() if Path(name).is_dir() else Path(name) for name in names]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        labels = []
        for path in paths:
            parts = [part for part in path.parts if part != path.anchor]
            has_run = path.parent.name == "checkpoints"  # RUN/checkpoints/step_000100: says nothing without RUN
            if has_run:
                del parts[-2]
            labels.append("/".join(parts[-depth - has_run :]))
        stems = [label.replace("/", "-") for label in labels]
        if len(set(stems)) == len(stems):
            return labels
    twice = next(name for i, name in enumerate(names) if stems[i] in stems[:i])
    raise EvalError(f"{twice!r} is there twice; leave one out, or write another model.name into one of the .json files")


def _protocols(result):
    """{task: what must be the same for two models to be compared}; n because of windows, which are not in the hash."""
    return {
        task: (about["version"], about["data"]["sha256"] or about["data"]["source"], result["results"][task].get("n"))
        for task, about in result["tasks"].items()
    }


def _check_alike(protocols):
    """Raises EvalError if two of {model: {task: protocol}} differ."""
    firsts = {}
    for name, task in ((name, task) for name, of_model in protocols.items() for task in of_model):
        first = firsts.setdefault(task, name)
        one, other = protocols[first][task], protocols[name][task]
        if one != other:
            # A hash's beginning, or what lm-eval says of its data.
            one, other = (f"version {v}, {n} items, {what if ' ' in what else what[:9]}" for v, what, n in (one, other))
            raise EvalError(
                f"{task} of {first!r} ({one}) and of {name!r} ({other}) cannot share a picture; score both with the "
                "same code, --data, --limit and --stride"
            )


def rows_of(results):
    """
    Args:
        results: list of dict, as `read_result` gives, of the same tasks.

    Returns:
        list of Row, the smallest model first.
    """
    rows = []
    for label, result in zip(labels_of([r["model"]["name"] for r in results]), results, strict=True):
        model = result["model"]
        sizes = [m.name.split()[-1] for m in GPT2 if m.size == (model["n_layer"], model["n_embd"])]
        figures = {}
        for task, about in result["tasks"].items():
            values = {name: x for name, x in result["results"][task].items() if x is not None and math.isfinite(x)}
            for figure in about["figures"]:
                if figure in values:
                    figures[task, figure] = values[figure], values.get(f"{figure}_stderr")
        rows.append(Row(" ".join([label, *(f"({size})" for size in sizes)]), OURS, model["parameters"], figures))
    return sorted(rows, key=lambda row: row.parameters)


def published_rows(result):
    """
    OpenAI's models, as far as they can be compared.

    Args:
        result: one of the results, which are all of the same items.

    Returns:
        (list of Row, list of sentences on what was left out and why)
    """
    models, notes = GPT2 + GPT3, []
    rows = [Row(f"{m.name} (published)", f"{m.family}, published", m.parameters, {}) for m in models]
    for task, about in result["tasks"].items():
        source = about["data"]["source"]
        why_not = why_not_comparable(about["data"], result["results"][task].get("n"), about["full_size"])
        published = [m.results.get(task, {}) for m in models]
        if task == "bits_per_byte":
            text = text_of(source)
            published = [{"loss": m.losses[text]} if text in m.losses else {} for m in models]
        if not any(published):
            notes.append(f"{task}: no published figures are known for {source}.")
        elif why_not is not None:
            notes.append(f"{task}: {why_not}.")
        elif task == "bits_per_byte" and PUBLISHED_WINDOWS not in source:
            notes.append(f"{task}: published losses need a whole validation split (shards, no --limit), --stride 1024.")
        else:
            for row, figures in zip(rows, published, strict=True):
                row.figures.update({(task, figure): (value, None) for figure, value in figures.items()})
            if task == "bits_per_byte":
                notes.append(f"{task}: published losses are of {text}, but of what others held back of it.")
    return [row for row in rows if row.figures], notes


def _columns(rows):
    """The (task, figure) that ours have: where only others have a number, there is nothing to compare."""
    return list(dict.fromkeys(column for row in rows if row.series == OURS for column in row.figures))


def table(rows, result, notes=()):
    """Markdown: a row a model; then what was scored, what the columns are, and the notes. Arguments as for `draw`."""
    columns = _columns(rows)
    lines = [("model", "parameters", *map(" ".join, columns)), ("---", *["---:"] * (len(columns) + 1))]
    for row in rows:
        numbers = [[f"{x:.4f}" for x in row.figures.get(column, ()) if x is not None] for column in columns]
        lines.append((row.label, f"{row.parameters:,}", *map(" ± ".join, numbers)))
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + "\n"
    for task, about in result["tasks"].items():
        digest = (about["data"]["sha256"] or "unknown")[:12]
        text += f"- {task}: {about['data']['source']} (version {about['version']}, sha256 {digest})\n"
        text += "".join(f"    - {figure}: {about['figures'][figure]}\n" for of, figure in columns if of == task)
    return text + "".join(f"- {note}\n" for note in notes)


def draw(rows, result):
    """
    Args:
        rows: list of Row.
        result: one of the results, for what the figures are and the items were.

    Returns:
        matplotlib's Figure: a panel a figure, in it a line a series.
    """
    # Imported here: half a second that nothing else should wait for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    columns = _columns(rows)
    width = len(columns) if len(columns) <= 3 else math.ceil(math.sqrt(len(columns)))
    height = math.ceil(len(columns) / width)
    figure = Figure(figsize=(5.6 * width, 4.6 * height + 0.4), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(height, width, squeeze=False).ravel()
    styles = dict(zip(dict.fromkeys(row.series for row in rows), ("o-C0", "s--C3", "^:C2"), strict=False))
    legend = {}
    for axes, column in zip(panels, columns, strict=False):
        for series, style in styles.items():
            if points := _points(rows, series, column):
                x, y, errors, _ = zip(*points, strict=True)
                errors = [error or 0.0 for error in errors] if any(errors) else None
                legend[series] = axes.errorbar(x, y, yerr=errors, fmt=style, ms=5, lw=1.2, capsize=3, label=series)
        (task, name), about = column, result["tasks"][column[0]]
        title = TITLES.get(task, task)
        if about["data"]["is_sample"]:
            title = f"own sample items, not {title}"
        if n := result["results"][task].get("n"):
            title += f": {n:,} {'windows' if task == 'bits_per_byte' else 'items'}"
        axes.set_title(f"{title}\n{textwrap.fill(about['figures'][name], 80)}", fontsize=8.5)
        axes.set(xscale="log", xlabel="parameters, millions", ylabel=name)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.minorticks_off()
        axes.margins(0.15)
        axes.grid(alpha=0.3)
    for axes in panels[len(columns) :]:
        axes.set_visible(False)
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=3, frameon=False)
    figure.draw_without_rendering()  # from here on the panels stay where they are, and labels can find a place
    for axes, column in zip(panels, columns, strict=False):
        _label_points(axes, [(x, y, label) for x, y, _, label in _points(rows, OURS, column)])
    return figure


def _points(rows, series, column):
    """[(millions of parameters, value, standard error or None, label)] of a panel's line."""
    of_series = [row for row in rows if row.series == series and column in row.figures]
    return [(row.parameters / 1e6, *row.figures[column], row.label) for row in of_series]


def _label_points(axes, points):
    """Writes each (x, y, label) as near to its point as leaves the other labels, and the lines, free."""
    from matplotlib.text import Text

    # Boxes that are taken: left, bottom, right, top; everything in pixels. The cost of being on one is in pixels of
    # distance: a label across a line can still be read.
    taken, costs = np.zeros((0, 4)), np.zeros(0)
    for line in axes.get_lines():
        corners = line.get_transform().transform(line.get_xydata())
        for start, end in itertools.pairwise([corners[0], *corners]):
            on_line = np.linspace(start, end, 30)
            taken, costs = np.vstack([taken, np.hstack([on_line - 4, on_line + 4])]), np.append(costs, [20.0] * 30)
    for x, y, label in points:
        lines = label.replace("/", "\n").replace(" (", "\n(")
        arrow = {"arrowstyle": "-", "lw": 0.5, "color": "C0"}
        style = {"fontsize": 7, "color": "C0", "ha": "center", "va": "center", "arrowprops": arrow}
        text = axes.annotate(lines, (x, y), (0, 0), textcoords="offset pixels", **style)
        text.set_in_layout(False)
        half = np.array(Text.get_window_extent(text).size) / 2 + 2  # without the arrow
        grid = np.linspace(axes.bbox.p0 + half, axes.bbox.p1 - half, 40)
        centres = np.stack(np.meshgrid(*grid.T), axis=-1).reshape(-1, 2)
        low, high = centres - half, centres + half
        is_hit = (taken[:, None, :2] < high).all(axis=-1) & (taken[:, None, 2:] > low).all(axis=-1)  # (taken, centres)
        point = axes.transData.transform((x, y))
        distances = np.linalg.norm(np.maximum(abs(centres - point) - half, 0), axis=-1)
        best = np.argmin(costs @ is_hit + distances)
        text.set_position(centres[best] - point)
        taken, costs = np.vstack([taken, np.hstack([low[best], high[best]])]), np.append(costs, 1e5)


def _main(arguments):
    args = _parse_arguments(arguments)
    args.checkpoints = resolve_checkpoints(args.checkpoints)
    results = {n: read_result(n) for n in args.checkpoints if n.endswith(".json") and not Path(n).is_dir()}
    to_score = [name for name in args.checkpoints if name not in results]
    if to_score:
        shown = args.tasks = args.tasks or ["hellaswag"]
        tasks = command.tasks_of(args)
    else:
        shown = args.tasks or [task for result in results.values() for task in result["tasks"]]
        for option in ("data", "limit", "stride"):
            if getattr(args, option) not in (None, []):
                raise EvalError(f"--{option}: nothing is scored here, all are results already; leave it out")
    for path, result in results.items():
        if lacking := [task for task in shown if task not in result["tasks"]]:
            raise EvalError(f"{path!r} has no {lacking[0]}; score that model on it too, or choose others with --tasks")
        result["tasks"] = {task: result["tasks"][task] for task in shown}
    for name in to_score:
        check_name(name)
    labels = labels_of([results[name]["model"]["name"] if name in results else name for name in args.checkpoints])
    device, speaks = command.find_device(args.device)
    opened = {name: load_tokenizer(name, trust_remote_code=args.trust_remote_code) for name in to_score}
    # All items are loaded, so that what is wrong with them shows before anything is scored.
    prepared = {name: prepare(tasks, *opened[name]) for name in to_score}
    protocols = {path: _protocols(result) for path, result in results.items()}
    for name in to_score:  # what lm-eval takes is known when it is done
        own = [p for p in prepared[name] if p.source is not None]
        protocols[name] = {p.task.name: (p.task.version, p.source.sha256, len(p.items)) for p in own}
    _check_alike(protocols)
    if speaks:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvalError(f"--out {str(args.out)!r} cannot be made ({error.strerror}); name another") from error
        command.check_output("--out", args.out / "miniseries.md")

    for name, label in zip(args.checkpoints, labels, strict=True):
        if name in to_score:
            tokenizer, _ = opened[name]
            results[name] = command.score_checkpoint(args, name, tokenizer, prepared.pop(name), device)
            if speaks:
                command.write_json("--out", args.out / f"{label.replace('/', '-')}.json", results[name])
    _check_alike({name: _protocols(result) for name, result in results.items()})
    if not speaks:
        return
    results = list(results.values())
    rows, notes = rows_of(results), []
    if not _columns(rows):
        raise EvalError(f"{', '.join(args.checkpoints)}: no figure is a finite number, so there is nothing to draw")
    if args.published:
        published, notes = published_rows(results[0])
        rows += published
    text, figure = table(rows, results[0], notes), draw(rows, results[0])
    command.write_aside("--out", args.out / "miniseries.md", lambda aside: aside.write_text(text, encoding="utf-8"))
    command.write_aside("--out", args.out / "miniseries.png", lambda aside: figure.savefig(aside, format="png"))
    print(f"{text}\nwritten: {args.out / 'miniseries.md'}, {args.out / 'miniseries.png'}")


def main(arguments=None):
    """
    Returns:
        exit code: 0, or 2 for what the user can mend, said on one line of stderr.
    """
    return command.run_command(_main, arguments)


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # the libraries' chatter, as in python -m eval
    sys.exit(main())
