"""Draw curves.png: losses and HellaSwag accuracy over training tokens."""

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
    hellaswag_lines: Mapping[str, float],
) -> None:
    """Draw training and validation loss, and HellaSwag accuracy if it was scored, over training tokens.

    Args:
        records: of metrics.jsonl.
        path: the PNG file to write.
        loss_lines: {name: value} of horizontal lines, such as OpenAI's models on the same data.
        hellaswag_lines: the same for HellaSwag.
    """
    # Imported here: it takes half a second, which the first step should not wait for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    has_scores = any(r.get("hellaswag") for r in records)
    figure = Figure(figsize=(12 if has_scores else 7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(1, 2 if has_scores else 1, squeeze=False)[0]
    draw_losses(axes[0], records, loss_lines)
    if has_scores:
        draw_hellaswag(axes[1], records, hellaswag_lines)
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
    _finish_axes(axes)


def draw_hellaswag(axes: "Axes", records: Sequence[dict[str, Any]], lines: Mapping[str, float]) -> None:
    """Draw HellaSwag's accuracies. At least one record must have them; see `plot_curves`."""
    scored = [r for r in records if r.get("hellaswag")]
    tokens = [r["tokens"] for r in scored]
    for key, label in (("acc_norm", "per token (acc_norm)"), ("acc", "sum (acc)")):
        axes.errorbar(
            tokens,
            [r["hellaswag"][key] for r in scored],
            yerr=[r["hellaswag"][f"{key}_stderr"] for r in scored],
            fmt="o-",
            ms=4,
            capsize=2,
            label=label,
        )
    _horizontal_lines(axes, {"chance": 0.25, **lines}, "{:.4g}")
    items = scored[-1]["hellaswag"]
    name = "HellaSwag" if not items["is_sample"] else "own HellaSwag-like sample, not HellaSwag"
    axes.set(ylabel="accuracy", title=f"{name}, {items['n']} items")
    _finish_axes(axes)


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


def _finish_axes(axes: "Axes") -> None:
    from matplotlib.ticker import EngFormatter

    axes.set(xlabel="training tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 250k, 10G
    axes.grid(alpha=0.3)
    axes.legend()
