"""Draw curves.png: losses and the scores of tasks over training tokens."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import atomic_write

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes


def plot_curves(
    records: Sequence[dict[str, Any]],
    path: Path,
    title: str,
    *,
    loss_lines: Mapping[str, float],
    score_lines: Mapping[str, Mapping[str, float]],
) -> None:
    """Draw training and validation loss, and a panel for HellaSwag and up to three other tasks, over training tokens.

    Args:
        loss_lines: {name: value} of horizontal lines, such as OpenAI's models on the same data.
        score_lines: the same for each task.
    """
    # Imported here: it takes half a second, which the first step should not wait for.
    from matplotlib.figure import Figure

    tasks = tasks_to_draw(records)
    rows = 1 if len(tasks) < 3 else 2
    columns = math.ceil((1 + len(tasks)) / rows)
    figure = Figure(figsize=((7, 12, 17)[columns - 1], 4.5 * rows), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    draw_losses(axes[0], records, loss_lines)
    for number, task in enumerate(tasks, start=1):
        draw_scores(axes[number], records, score_lines.get(task, {}), task)
    for unused in axes[len(tasks) + 1 :]:
        unused.remove()
    with atomic_write(path) as tmp_path:
        figure.savefig(tmp_path, format="png", dpi=120)


def draw_losses(axes: "Axes", records: Sequence[dict[str, Any]], lines: Mapping[str, float]) -> None:
    """Draw training and validation loss; see `plot_curves`."""
    import numpy as np

    train = [r for r in records if r.get("loss") is not None]
    skipped = [r for r in records if "skipped" in r]
    evaluations = [r for r in records if r.get("val_loss") is not None]

    losses = np.array([r["loss"] for r in train])
    smooth = moving_average(losses, width=max(1, len(losses) // 40))
    train_tokens = [r["tokens"] for r in train]
    axes.plot(train_tokens, losses, color="tab:blue", lw=0.7, alpha=0.25)
    axes.plot(train_tokens, smooth, color="tab:blue", lw=1.5, label="training, moving average")
    axes.plot(
        [r["tokens"] for r in evaluations],
        [r["val_loss"] for r in evaluations],
        "o-",
        color="tab:orange",
        ms=4,
        label=f"validation ({evaluations[-1]['val_loss']:.3f})" if evaluations else "validation",
    )
    for number, folder in enumerate(evaluations[-1].get("val_losses", {}) if evaluations else {}):
        # Before it was resumed, a run may have had its folders under other names.
        known = [r for r in evaluations if folder in r.get("val_losses", {})]
        val_losses = [r["val_losses"][folder] for r in known]
        color = f"C{5 + number}"  # the first ones are those of the other lines
        name = f"{folder} ({val_losses[-1]:.3f})"
        axes.plot([r["tokens"] for r in known], val_losses, color=color, lw=1, label=name)
    for number, record in enumerate(skipped):
        label = f"skipped steps ({len(skipped)})" if number == 0 else None
        axes.axvline(record["tokens"], color="tab:purple", lw=1, alpha=0.5, label=label)
    _horizontal_lines(axes, lines, "{:.3f}")
    axes.set(ylabel="loss, nats per token")
    if len(losses) >= 40:  # cut off the first steps, so that the end can be read
        axes.set_ylim(top=1.05 * max([smooth[len(smooth) // 20 :].max(), *lines.values()]))
    finish_axes(axes)


def draw_scores(axes: "Axes", records: Sequence[dict[str, Any]], lines: Mapping[str, float], task: str) -> None:
    """Draw a task's main metric with its standard error. At least one record must have it; see `plot_curves`."""
    scored = [(r["tokens"], scores_of(r)[task]) for r in records if task in scores_of(r)]
    last = scored[-1][1]
    title, ylabel = "HellaSwag", "accuracy"
    labels = {"acc_norm": "per token (acc_norm)", "acc": "sum (acc)"}
    if last.get("is_sample"):
        title = "own HellaSwag-like sample, not HellaSwag"
    if task != "hellaswag":
        main = metric_names(last)[0]
        title, ylabel, labels = task, score_name(task, main), {main: f"last: {format_score(last[main])}"}
    for key, label in labels.items():
        values, errors = (  # None in metrics.jsonl: not a number
            [math.nan if scores.get(name) is None else scores[name] for _, scores in scored]
            for name in (key, f"{key}_stderr")
        )
        axes.errorbar([tokens for tokens, _ in scored], values, yerr=errors, fmt="o-", ms=4, capsize=2, label=label)
    _horizontal_lines(axes, lines, "{:.4g}")
    axes.set(ylabel=ylabel, title=f"{title}, {last['n']:,} items")
    finish_axes(axes)


def scores_of(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a record's scores by task, HellaSwag's first."""
    hellaswag = {"hellaswag": record["hellaswag"]} if record.get("hellaswag") else {}
    return hellaswag | record.get("scores", {})


def tasks_to_draw(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return the tasks that have panels: HellaSwag and the first three others."""
    tasks = [*dict.fromkeys(task for record in records for task in scores_of(record))]
    tasks.sort(key=lambda task: task != "hellaswag")
    return tasks[: 4 if "hellaswag" in tasks else 3]


def metric_names(scores: Mapping[str, Any]) -> list[str]:
    """Return the names of a task's metrics in a record, the main one first."""
    return [name for name in scores if not re.fullmatch(r"n|is_sample|num_.*|.*_stderr", name)]


def score_name(task: str, metric: str) -> str:
    """Return "lambada acc", or "core" for that metric of the task core."""
    return task if metric == task else f"{task} {metric}"


def format_score(value: float | None) -> str:
    """Format a proportion, a loss or a perplexity."""
    value = math.nan if value is None else value
    return f"{value:.4f}" if value < 100 else f"{value:,.1f}"


def moving_average(values: "np.ndarray", width: int) -> "np.ndarray":
    """Return the mean of the last `width` values at each position, of fewer at the start."""
    import numpy as np

    sums = np.cumsum(np.insert(values.astype(float), 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _horizontal_lines(axes: "Axes", lines: Mapping[str, float], number_format: str) -> None:
    for color, (name, value) in zip(("gray", "tab:red", "tab:green", "tab:brown"), lines.items(), strict=False):
        axes.axhline(value, color=color, ls="--", lw=1, label=f"{name} ({number_format.format(value)})")


def finish_axes(axes: "Axes") -> None:
    """Add what the plots over training tokens have in common."""
    from matplotlib.ticker import EngFormatter

    axes.set(xlabel="training tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 250k, 10G
    axes.grid(alpha=0.3)
    axes.legend()
