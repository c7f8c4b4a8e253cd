"""What a run measured, for programs: metrics.jsonl."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from common.files import finite, write_aside
from training import TrainingError


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


def read_metrics(path: str | Path) -> list[dict]:
    """
    Return the objects of a metrics.jsonl, none if there is no such file; without a last line cut short by a crash.

    Raises:
        TrainingError: another line is not such an object, or the file cannot be read.
    """
    records, damaged = _parse(path)
    if damaged:
        raise TrainingError(f"{path}:{damaged[0]} is not the record of a step; remove the line")
    return records


def recover_metrics(path: str | Path, keep_in: Path, warn: Callable[[str], None]) -> list[dict]:
    """
    Return what `read_metrics` does, of a file that the run is about to replace: without damaged lines.

    Args:
        keep_in: where a damaged file is copied to.
        warn: called with a line if the file is damaged.

    Raises:
        TrainingError: it cannot be read.
    """
    records, damaged = _parse(path)
    if damaged:
        copies = (keep_in / f"metrics.damaged-{number}.jsonl" for number in itertools.count(1))
        copy = next(path for path in copies if not path.exists())
        shutil.copyfile(path, copy)
        warn(
            f"warning: {path}:{damaged[0]} is not the record of a step ({len(damaged):,} such lines). The run "
            f"continues without them; {copy} is a copy of the file"
        )
    return records


def _parse(path: str | Path) -> tuple[list[dict], list[int]]:
    """Return (records, numbers of the damaged lines)."""
    path = Path(path)
    if not path.exists():
        return [], []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror or error}") from None
    records, damaged = [], []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise ValueError
            records.append(record)
        except (ValueError, TypeError, KeyError, RecursionError):
            is_cut_short = number == len(lines) and line[:1] in ("{", "")
            if not is_cut_short:
                damaged.append(number)
    return records, damaged
