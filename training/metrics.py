"""What a run measured, for programs: metrics.jsonl."""

import json
import math
from pathlib import Path

from training.files import write_aside


class MetricsLog:
    """
    `metrics.jsonl`: one JSON object a line, one line a training step
    {"step", "tokens", "loss", "lr", "grad_norm", "ms", "tokens_per_s"} and one an evaluation
    {"step", "tokens", "val_loss", "hellaswag", "seconds"}. `step` counts optimizer steps. A step that was skipped also
    has "skipped", and null where a number was not finite.
    """

    def __init__(self, path, *, resume_step=None, warn=print):
        """
        Args:
            path: the file. A fresh run starts it anew.
            resume_step: keep what was measured up to this step and drop what a lost stretch wrote after it.
            warn: called with a line when the disk does not take what was measured.
        """
        self.path, self._warn = Path(path), warn
        kept = [] if resume_step is None else [r for r in read_metrics(path) if r["step"] <= resume_step]
        write_aside(self.path, "".join(json.dumps(record) + "\n" for record in kept))
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


def finite(value):
    """The same dict, list or number with None in the place of NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
