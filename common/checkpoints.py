"""Find a run's checkpoints, resolve the name `best`, and detect damage.

`runs/x/checkpoints/best` is a name and not a folder: it means the checkpoint with the lowest validation loss in its
training_state/state.json. In archives, on cloud drives and on Windows, a link would get lost or become an old copy.
"""

import glob
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from common.cli import is_main_process
from common.errors import UserError
from common.files import read_json

BEST = "best"
_STEP_FOLDER = re.compile(r"step_(\d{6,})")
_MOST_LISTED = 8


class Checkpoint(NamedTuple):
    """A checkpoint's folder, as a run wrote it."""

    step: int
    folder: Path
    val_loss: float | None
    """None if the checkpoint was not evaluated, the loss was not finite, or the file that has it is missing"""

    def describe(self) -> str:
        """Return "runs/x/checkpoints/step_000100 (validation loss 3.1234)"."""
        loss = "no validation loss" if self.val_loss is None else f"validation loss {self.val_loss:.4f}"
        return f"{self.folder} ({loss})"


def list_checkpoints(folder: str | os.PathLike) -> list[Checkpoint]:
    """Return the checkpoints in a run's `checkpoints` folder, in the order of their steps."""
    found = []
    for path in Path(folder).glob("step_*"):
        match = _STEP_FOLDER.fullmatch(path.name)
        if match and path.is_dir():
            val_loss = read_json(path / "training_state" / "state.json").get("val_loss")
            found.append(Checkpoint(int(match[1]), path, val_loss if isinstance(val_loss, float) else None))
    return sorted(found)


def best_of(checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
    """Return the checkpoint with the lowest validation loss; None if no checkpoint was evaluated."""
    evaluated = [(c.val_loss, c) for c in checkpoints if c.val_loss is not None]
    return min(evaluated)[1] if evaluated else None


def resolve_checkpoint(name: str | os.PathLike) -> str:
    """Return the folder that a checkpoint's name means. For `best`, print the folder on stderr.

    Args:
        name: a checkpoint's folder or a Hub id, returned unchanged; or .../best next to step folders, which means the
            one with the lowest validation loss. Without step folders next to it, `best` is an ordinary folder.

    Raises:
        UserError: `best` where no checkpoint was evaluated, or a run's folder instead of a checkpoint's.
    """
    path = Path(name)
    try:
        if path.name == BEST and path.parent.is_dir():
            return _resolve_best(path)
        if path.is_dir() and not (path / "config.json").is_file():
            _refuse_run_folder(path)
    except OSError:  # a name that is too long, a folder without read permission: the caller reports it
        pass
    return os.fspath(name)


def is_local(name: str | os.PathLike) -> bool:
    """Return True for a folder, and for `best` of a run in this file system, rather than a Hub id."""
    path = Path(name)
    return path.is_dir() or (path.name == BEST and bool(list_checkpoints(path.parent)))


def resolve_checkpoints(names: Iterable[str]) -> list[str]:
    """Resolve several names; a pattern such as "runs/*/checkpoints/best" means every checkpoint that it matches.

    Raises:
        UserError: see `resolve_checkpoint`; or a pattern matches nothing.
    """
    resolved: list[str] = []
    for name in names:
        matches: list[str | Path] = [name]
        if glob.has_magic(name) and not Path(name).exists():
            is_best = Path(name).name == BEST  # a name, not a folder
            folders = sorted(glob.glob(str(Path(name).parent) if is_best else name))  # noqa: PTH207 (absolute ones, too)
            matches = [Path(f) / BEST for f in folders if best_of(list_checkpoints(f))] if is_best else [*folders]
        if not matches:
            raise UserError(f"{name!r} matches nothing; give checkpoints, or a pattern that matches some")
        resolved += map(resolve_checkpoint, matches)
    return resolved


def find_damage(folder: str | os.PathLike) -> str | None:
    """Return what is wrong with a checkpoint of train.py, or None. Every byte is compared with its manifest."""
    folder = Path(folder)
    try:
        files = json.loads((folder / "training_state" / "manifest.json").read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes and not {expected['bytes']:,}"
            if describe_file(path) != expected:
                return f"{name} is not what was written (its SHA-256 differs)"
    except FileNotFoundError:
        return "training_state/manifest.json is missing, so the checkpoint is incomplete"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"the checkpoint cannot be read ({error})"
    return None


def describe_file(path: Path) -> dict[str, int | str]:
    """Return a file's entry in a checkpoint's manifest: {"bytes", "sha256"}."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _resolve_best(path: Path) -> str:
    checkpoints = list_checkpoints(path.parent)
    if not checkpoints:
        if not path.is_dir() and path.parent.name == "checkpoints":
            raise UserError(f"{str(path)!r}: {path.parent} does not have a checkpoint yet")
        return str(path)
    best = best_of(checkpoints)
    if best is None:
        raise UserError(
            f"{str(path)!r}: no checkpoint in {path.parent} was evaluated, so none is the best; give one of "
            f"{_listed(checkpoints)}"
        )
    if is_main_process():
        print(f"best      {best.describe()}", file=sys.stderr)
    return str(best.folder)


def _refuse_run_folder(path: Path) -> None:
    """Raise UserError for runs/x and runs/x/checkpoints."""
    checkpoints = list_checkpoints(path) or list_checkpoints(path / "checkpoints")
    if checkpoints:
        raise UserError(f"{str(path)!r} is a run's folder, not a checkpoint; give one of {_listed(checkpoints)}")
    if (path / "status.json").is_file() or (path / "metrics.jsonl").is_file():
        raise UserError(f"{str(path)!r} is a run's folder and does not have a checkpoint yet")


def _listed(checkpoints: list[Checkpoint]) -> str:
    best = best_of(checkpoints)
    shown = checkpoints[-_MOST_LISTED:]
    if best is not None and best not in shown:
        shown = [best, *shown[1:]]
    listed = [f"{c.describe()[:-1]}, the best)" if c == best else c.describe() for c in shown]
    if left_out := len(checkpoints) - len(shown):
        listed.append(f"{left_out} more")
    return ", ".join(listed)


def has_tokenizer(folder: str | Path) -> bool:
    """Return True if a folder has a tokenizer's files."""
    return any(Path(folder).glob("tokenizer*")) or any(Path(folder).glob("vocab*"))
