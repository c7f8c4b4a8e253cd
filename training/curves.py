"""What a run measured, for people: curves.png, with OpenAI's models as horizontal lines where they can be compared."""

import json
from pathlib import Path

# (layers, width) -> the model's name and its HellaSwag, ending with the highest log-likelihood a token. GPT-2's:
# build-nanogpt hellaswag.py and llm.c dev/vislog.ipynb; GPT-3's: the GPT-3 paper, table H.1, model of that size.
_HELLASWAG = {
    (12, 768): {"OpenAI GPT-2 124M": 0.2955, "GPT-3 125M": 0.337},
    (24, 1024): {"OpenAI GPT-2 350M": 0.3752, "GPT-3 350M": 0.436},
    (36, 1280): {"OpenAI GPT-2 774M": 0.4320, "GPT-3 760M": 0.510},
    (48, 1600): {"OpenAI GPT-2 1558M": 0.4893, "GPT-3 1.3B": 0.547},
}
# Validation loss of OpenAI's GPT-2, nats a token: it depends on the text. FineWeb-Edu as build-nanogpt splits it,
# FineWeb as llm.c does.
_LOSS = {
    (12, 768): {"fineweb-edu": ("OpenAI GPT-2 124M", 3.2924), "fineweb": ("OpenAI GPT-2 124M", 3.425)},
    (24, 1024): {"fineweb": ("OpenAI GPT-2 350M", 3.083)},
    (36, 1280): {"fineweb": ("OpenAI GPT-2 774M", 3.001)},
    (48, 1600): {"fineweb": ("OpenAI GPT-2 1558M", 2.831)},
}


def published_lines(shape, data_source, item_source):
    """
    What OpenAI's models of this size have, as far as it can be compared.

    Args:
        shape: has n_layer and n_embd; a GPT2ReproConfig.
        data_source: JSON-able, where the training data came from; None if not known.
        item_source: where HellaSwag's items came from, an eval.hellaswag.items.ItemSource; None if nothing is scored.

    Returns:
        ({name: loss}, {name: accuracy}), both possibly empty.
    """
    size = shape.n_layer, shape.n_embd
    source = json.dumps(data_source).lower()
    is_edu = any(name in source for name in ("fineweb-edu", "finewebedu", "edu_fineweb"))
    data = "fineweb-edu" if is_edu else "fineweb" if "fineweb" in source else None
    losses = dict([_LOSS[size][data]]) if data in _LOSS.get(size, {}) else {}
    # This project's own items nobody else was scored on.
    is_comparable = item_source is not None and not item_source.is_sample
    return losses, _HELLASWAG.get(size, {}) if is_comparable else {}


def plot_curves(records, path, title, *, loss_lines, hellaswag_lines):
    """
    Draws training and validation loss, and HellaSwag accuracy where it was scored, over tokens.

    Args:
        records: what `training.metrics.read_metrics` gives.
        path: the picture, PNG; replaced as a whole.
        loss_lines, hellaswag_lines: {name: value}, drawn as horizontal lines.
    """
    # Imported here: half a second that training should not wait for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [r for r in records if r.get("loss") is not None]
    skipped = [r for r in records if "skipped" in r]
    evaluations = [r for r in records if r.get("val_loss") is not None]
    scored = [r for r in records if r.get("hellaswag")]

    figure = Figure(figsize=(12 if scored else 7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(1, 2 if scored else 1, squeeze=False)[0]

    axes[0].plot([r["tokens"] for r in train], [r["loss"] for r in train], lw=1, alpha=0.7, label="train")
    axes[0].plot(
        [r["tokens"] for r in evaluations],
        [r["val_loss"] for r in evaluations],
        "o-",
        ms=4,
        label=f"validation ({evaluations[-1]['val_loss']:.3f})" if evaluations else "validation",
    )
    for number, record in enumerate(skipped):
        label = f"skipped steps ({len(skipped)})" if number == 0 else None
        axes[0].axvline(record["tokens"], color="tab:purple", lw=1, alpha=0.5, label=label)
    _horizontal_lines(axes[0], loss_lines, "{:.3f}")
    axes[0].set(xlabel="training tokens", ylabel="loss, nats a token")
    axes[0].legend()

    if scored:
        tokens = [r["tokens"] for r in scored]
        for key, label in (("acc_norm", "per token (acc_norm)"), ("acc", "sum (acc)")):
            axes[1].errorbar(
                tokens,
                [r["hellaswag"][key] for r in scored],
                yerr=[r["hellaswag"][f"{key}_stderr"] for r in scored],
                fmt="o-",
                ms=4,
                capsize=2,
                label=label,
            )
        _horizontal_lines(axes[1], {"chance": 0.25, **hellaswag_lines}, "{:.4g}")
        items = scored[-1]["hellaswag"]
        name = "HellaSwag" if not items["is_sample"] else "own HellaSwag-like sample, not HellaSwag"
        axes[1].set(xlabel="training tokens", ylabel="accuracy", title=f"{name}, {items['n']} items")
        axes[1].legend()

    for axis in axes:
        axis.grid(alpha=0.3)
    aside = Path(path).with_name(f".{Path(path).name}.partial")
    figure.savefig(aside, format="png", dpi=120)
    aside.replace(path)


def _horizontal_lines(axes, lines, number_format):
    for color, (name, value) in zip(("gray", "tab:red", "tab:green", "tab:brown"), lines.items(), strict=False):
        axes.axhline(value, color=color, ls="--", lw=1, label=f"{name} ({number_format.format(value)})")
