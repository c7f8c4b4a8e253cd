"""What a run measured: metrics.jsonl for programs, curves.png for people."""

import json
from pathlib import Path


class MetricsLog:
    """
    `metrics.jsonl`: one JSON object a line, one line a training step
    {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s"} and one an evaluation
    {"step", "tokens", "val_loss", "hellaswag"}. `step` counts optimizer steps taken.
    """

    def __init__(self, path, resume_step=None):
        """
        Args:
            path: the file. A fresh run starts it anew.
            resume_step: keep what was measured up to this step and drop what a lost stretch wrote after it.
        """
        self.path = Path(path)
        kept = [] if resume_step is None else [r for r in read_metrics(path) if r["step"] <= resume_step]
        write_aside(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, record):
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self):
        self._file.close()


def read_metrics(path):
    """The objects of a metrics.jsonl; a last line cut short by a crash is left out."""
    path = Path(path)
    if not path.is_file():
        return []
    records = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number != len(lines) - 1:
                raise
    return records


def write_aside(path, text):
    """Writes a text file under another name, then renames it."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def write_json(path, value):
    """Writes a JSON file under another name, then renames it."""
    write_aside(path, json.dumps(value, indent=2) + "\n")


def plot_curves(records, path, title, baselines):
    """
    Draws curves.png: training and validation loss, and HellaSwag accuracy where it was scored, over tokens.

    Args:
        records: what `read_metrics` gives.
        path: the picture, PNG; replaced as a whole.
        baselines: {"bigram": nats a token, ...}, drawn as horizontal lines on the losses.
    """
    # Imported here: half a second that training should not wait for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [r for r in records if "loss" in r]
    evaluations = [r for r in records if "val_loss" in r]
    scored = [r for r in evaluations if r.get("hellaswag")]

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
    for color, (name, value) in zip(("gray", "tab:red"), baselines.items(), strict=False):
        axes[0].axhline(value, color=color, ls="--", lw=1, label=f"{name} baseline ({value:.3f})")
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
        axes[1].axhline(0.25, color="gray", ls="--", lw=1, label="chance")
        items = scored[-1]["hellaswag"]
        name = "HellaSwag" if not items["is_sample"] else "own HellaSwag-like sample, not HellaSwag"
        axes[1].set(xlabel="training tokens", ylabel="accuracy", title=f"{name}, {items['n']} items")
        axes[1].legend()

    for axis in axes:
        axis.grid(alpha=0.3)
    aside = Path(path).with_name(f".{Path(path).name}.partial")
    figure.savefig(aside, format="png", dpi=120)
    aside.replace(path)
