"""Write metrics.jsonl. (hub/ still imports `read_metrics` from here; its home is common/metrics.py.)"""

import json
from pathlib import Path

from common.files import finite, write_aside
from common.metrics import read_metrics

__all__ = ["MetricsLog", "read_metrics", "until"]


class MetricsLog:
    """
    `metrics.jsonl`: one JSON object a line, one line a training step
    {"step", "tokens", "loss", "lr", "grad_norm", "ms", "tokens_per_s"} and one an evaluation
    {"step", "tokens", "val_loss", "hellaswag", "hellaswag_seconds", "seconds"}. `step` counts optimizer
    steps. A step that was skipped also has "skipped", and null where a number was not finite.
    """

    def __init__(self, path, *, earlier=(), warn=print):
        """
        Args:
            path: the file, made anew.
            earlier: records that it begins with; `until` gives those of a run that goes on.
            warn: called with a line when the disk does not take what was measured.
        """
        self.path, self._warn = Path(path), warn
        write_aside(self.path, "".join(json.dumps(record) + "\n" for record in earlier))
        self._file = self.path.open("ab", buffering=0)
        self._pending = b""

    def write(self, record):
        """Appends a line. On a full disk it waits in memory for a later one to take it along."""
        was_behind = bool(self._pending)
        self._pending += json.dumps(finite(record), allow_nan=False).encode() + b"\n"
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not was_behind:
                self._warn(f"warning: {self.path} cannot be written ({error}); its lines are kept until it can")

    def close(self):
        self._file.close()


def until(records, step, *, is_evaluated):
    """
    What a run keeps that goes on from a checkpoint: a lost stretch wrote more, and writes it again.

    Args:
        step: the checkpoint's.
        is_evaluated: whether the evaluation of that step was over when it was saved.
    """
    return [r for r in records if r["step"] < step or (r["step"] == step and (is_evaluated or "val_loss" not in r))]
