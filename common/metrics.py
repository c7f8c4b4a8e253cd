"""Read a run's metrics.jsonl, also after a crash or with damaged lines."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

from common.cli import say
from common.errors import UserError


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the objects of a metrics.jsonl, without a last line that a crash cut short; empty if the file is missing.

    Raises:
        UserError: another line is not such an object, or the file cannot be read.
    """
    records, damaged = _parse(path)
    if damaged:
        raise UserError(f"{path}:{damaged[0]} is not the record of a step; remove the line")
    return records


def recover_metrics(path: str | Path, copy_to: Path) -> list[dict[str, Any]]:
    """Return the objects of a metrics.jsonl without its damaged lines, for a run that is about to replace the file.

    If the file is damaged, print a warning, and write a copy of it into the folder `copy_to`.

    Raises:
        UserError: the file cannot be read.
    """
    records, damaged = _parse(path)
    if damaged:
        copies = (copy_to / f"metrics.damaged-{number}.jsonl" for number in itertools.count(1))
        copy = next(path for path in copies if not path.exists())
        shutil.copyfile(path, copy)
        say(
            f"warning: {path}:{damaged[0]} is not the record of a step ({len(damaged):,} such lines). The run "
            f"continues without them; {copy} is a copy of the file"
        )
    return records


def _parse(path: str | Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Return (records, numbers of the damaged lines)."""
    path = Path(path)
    if not path.exists():
        return [], []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
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
