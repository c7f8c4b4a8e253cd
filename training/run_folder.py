"""The folder of a run: one run in it at a time, and status.json says what became of it."""

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import UserError, one_line
from common.files import write_json
from common.locks import Lock, Timeout
from training import TrainingError
from training.distributed import MainProcessFailed

_PATIENCE_S = 60
_POLL_S = 1.0


class RunFolder:
    """
    A run's folder, from the lock to the last status. A context manager in every process of the run: leaving it releases
    the lock, and if an exception ends the run, status.json says "failed" and names the exception.
    """

    def __init__(self, path: str | os.PathLike, say: Callable[[str], object]):
        """
        Args:
            path: the folder, which need not exist yet.
            say: called with a line for the user.
        """
        self.path, self._say = Path(path), say
        self._lock, self._has_begun = None, False

    def lock(self, check: Callable[[], object] = lambda: None) -> None:
        """
        Keep other runs out of the folder. A run that was just asked to stop has a minute to leave.

        Args:
            check: called while another process is in the folder; raises an error if waiting is of no use.

        Raises:
            TrainingError: another process does not leave, or the folder cannot be made.
        """
        path = self.path.absolute()
        if not path.name:
            raise TrainingError(f"output_dir={str(path)!r} is not a folder for a run; name one below it")
        # Next to the folder, which is made only when nothing can be wrong any more.
        lock = Lock(path.with_name(f".{path.name}.lock"), warn=self._say)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_dir():
                raise NotADirectoryError(f"{path} is a file")
            self._wait_for(lock, check)
        except OSError as error:
            raise TrainingError(f"output_dir={path} cannot be written to ({error}); choose another one") from None
        self._lock = lock

    def _wait_for(self, lock: Lock, check: Callable[[], object]) -> None:
        deadline, timeout, is_waiting = time.monotonic() + _PATIENCE_S, 0.0, False
        while True:
            with contextlib.suppress(Timeout):
                lock.acquire(timeout)
                return
            try:
                check()
            except UserError as error:
                raise TrainingError(
                    f"another process is training in {self.path}: choose another --output_dir. Nor would it work after "
                    f"that process has ended: {error}"
                ) from None
            if time.monotonic() >= deadline:
                raise TrainingError(
                    f"another process is training in {self.path}: wait for it, stop it, or choose another --output_dir"
                )
            if not is_waiting:
                self._say(f"run       another process is at work in {self.path}; waiting for it to leave")
            is_waiting, timeout = True, min(_POLL_S, _PATIENCE_S)

    def begin(self, is_main: bool) -> None:
        """Every process calls it when nothing can be wrong any more: status "running", written by the main one."""
        if is_main:
            self.write_status("running")
        self._has_begun = True

    def write_status(self, status: str, **more: Any) -> None:
        """
        Write status.json, for scripts: launchers do not pass on the exit code of what they launch.

        Args:
            status: "running" (or killed), "resume me", "failed" (with "error") or "finished".
        """
        write_json(self.path / "status.json", {"status": status, "pid": os.getpid(), **more})

    def write_finished(self, checkpoint: Path, step: int, val_loss: float | None) -> None:
        """Write the status "finished", unless it is there already."""
        if self._status() != "finished":
            self.write_status("finished", step=step, val_loss=val_loss, checkpoint=str(checkpoint))

    def _status(self) -> str | None:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            return json.loads((self.path / "status.json").read_text(encoding="utf-8"))["status"]
        return None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        # Any process may be the first that fails; those that fail after it do so because they lost it. "finished" and
        # "resume me" are not overwritten.
        if isinstance(error, UserError) and self._has_begun:
            error.exit_code = 1
        is_own = error is not None and not isinstance(error, MainProcessFailed)
        if is_own and self._has_begun and self._status() in ("running", None):
            with contextlib.suppress(Exception):
                self.write_status("failed", error=describe(error))
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def describe(error: BaseException) -> str:
    """Return an exception as one line: a user's error as its message, a bug with the name of its class."""
    if isinstance(error, UserError):
        return one_line(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted (Ctrl-C) before a checkpoint of the last steps was saved"
    return f"{type(error).__name__}: {one_line(error)}"
