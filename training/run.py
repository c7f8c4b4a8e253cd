"""A run's folder (lock, status.json) and requests to stop the run (signals, time limit, dead launcher)."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from common.cli import interrupt_exit_code, is_main_process, print_error, say
from common.errors import UserError, one_line
from common.files import read_json, write_json
from common.locks import Lock, Timeout
from common.terminal import is_launched
from training import TrainingError
from training.checkpoint import (
    LoopState,
    check_start,
    checkpoint_folder,
    find_checkpoint,
    remove_leftovers,
)
from training.distributed import MainProcessFailed

# sysexits.h, EX_TEMPFAIL: "temporary failure; the user is invited to retry". Here: resume the run.
EXIT_RESUME = 75
_PATIENCE_SECONDS = 60.0  # for another run, which may be about to stop, to leave the folder
# SIGUSR1 is what SLURM and others send before a time limit, SIGHUP comes from a closed terminal or a lost SSH
# connection, and SIGBREAK is Windows' Ctrl-Break.
_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP", "SIGBREAK")


class RunFolder:
    """A run's folder, from the lock to the last status.

    A context manager in every process of the run: leaving it releases the lock, and if an exception ends the run,
    status.json says "failed" and names the exception. Only the main process writes.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._lock: Lock | None = None
        self._is_running = False

    def open(self, resume: str | None) -> Path | None:
        """Lock the folder and return the checkpoint to resume from. Called on the main process.

        Raises:
            TrainingError: as `lock` and `find_checkpoint`.
        """
        self.lock(resume)
        remove_leftovers(self.path)
        return find_checkpoint(resume, self.path)

    def lock(self, resume: str | None) -> None:
        """Keep other runs out of the folder. Wait for another run that is about to stop.

        Raises:
            TrainingError: another process does not leave, waiting is useless since `check_start` refuses the start, or
                the folder cannot be created.
        """
        path = self.path.absolute()
        if not path.name:
            raise TrainingError(f"output_dir={str(path)!r} is not a folder for a run; name one below it")
        # Next to the folder, which is created only after all checks.
        self._lock = Lock(path.with_name(f".{path.name}.lock"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_dir():
                raise NotADirectoryError(f"{path} is a file")
            with contextlib.suppress(Timeout):
                self._lock.acquire(0)
                return
            try:
                check_start(resume, self.path)
            except UserError as error:
                raise TrainingError(
                    f"another process is training in {self.path}: choose another --output_dir. After that process has "
                    f"ended, this start would fail as well: {error}"
                ) from None
            say(f"run       another process uses {self.path}; waiting for it to leave")
            self._lock.acquire(_PATIENCE_SECONDS)
        except Timeout:
            raise TrainingError(
                f"another process is training in {self.path}: wait for it, stop it, or choose another --output_dir"
            ) from None
        except OSError as error:
            raise TrainingError(f"output_dir={path} cannot be written to ({error}); choose another one") from None

    def mark_running(self) -> None:
        """Mark the run as running, after all checks. Every process must call this."""
        self._write("running")
        self._is_running = True

    def finish(self, state: LoopState, stop_reason: str | None) -> int:
        """Write the run's last status, and print a line unless that is "finished". Every process must call this.

        Args:
            stop_reason: why the run stops before its last step; None if it does not.

        Returns:
            exit code
        """
        checkpoint = checkpoint_folder(self.path, state.step)
        if stop_reason is not None:
            # 0 under a launcher that mistakes other codes for a crash: one that restarts the run (--max_restarts), or
            # accelerate's after Ctrl-C, which prints a traceback.
            is_restarted = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
            exit_code = 0 if is_restarted or (stop_reason == "SIGINT" and interrupt_exit_code() == 0) else EXIT_RESUME
            self._write("resume me", step=state.step, exit_code=exit_code)
            say(f"\nstopped at step {state.step:,} ({stop_reason}); resume with the same command and --resume auto")
            return exit_code
        if state.has_diverged:
            error = (
                f"the validation loss of {checkpoint} is not finite: the training diverged. Train again in another "
                "--output_dir with a lower optim.lr or more optim.warmup_steps, from the start or from an earlier "
                "checkpoint (--resume)"
            )
            if is_main_process():
                print_error(error)
            self._write("failed", error=error, is_mistake=True)
            return 1
        if read_json(self.path / "status.json").get("status") != "finished":
            self._write("finished", step=state.step, val_loss=state.val_loss, checkpoint=str(checkpoint))
        return 0

    def _write(self, status: str, *, from_any_process: bool = False, **fields: Any) -> None:
        """Write status.json, for scripts: launchers do not pass on the exit code of the program they launch.

        "is_mistake" of a failed run: starting it again does not help before the user has changed something.
        """
        if is_main_process() or from_any_process:
            write_json(self.path / "status.json", {"status": status, "pid": os.getpid(), **fields})

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Any process may be the first to fail; the others fail because they lost it, and do not overwrite its error.
        # "finished" and "resume me" are not overwritten either.
        if isinstance(error, UserError) and self._is_running:
            error.exit_code = 1
        if error is not None and self._is_running and not isinstance(error, MainProcessFailed):
            with contextlib.suppress(Exception):
                if read_json(self.path / "status.json").get("status") in ("running", None):
                    fields = {"error": describe_error(error), "is_mistake": isinstance(error, UserError)}
                    self._write("failed", from_any_process=True, **fields)
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def describe_error(error: BaseException) -> str:
    """Return an exception as one line: a user's error as its message, a bug with the name of its class."""
    if isinstance(error, UserError):
        return one_line(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted (Ctrl-C) before a checkpoint of the last steps was saved"
    return f"{type(error).__name__}: {one_line(error)}"


class StopRequest:
    """A request to stop the run: SIGTERM, SIGUSR1, SIGHUP, Ctrl-C, a time limit, or the launcher's death.

    A context manager: leaving it restores the signal handlers.

    Args:
        started: time.monotonic() when the program began.
    """

    def __init__(self, max_hours: float | None, started: float) -> None:
        self.reason: str | None = None
        """the signal's name or another reason; None if this process has no request"""
        self._handlers_before: dict[int, Any] = {}
        self._deadline = None if max_hours is None else started + 3600 * max_hours
        self._max_hours = max_hours
        self._interrupted_at: float | None = None
        # A killed launcher leaves its processes running, where they are easily overlooked and block the folder.
        self._launcher = os.getppid() if is_launched() or "TORCHELASTIC_RUN_ID" in os.environ else None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            say(
                "warning: training in a thread, which gets no signals: Ctrl-C and SIGTERM do not save a checkpoint "
                "(--max_hours does)"
            )
            return self
        for name in _SIGNALS:
            number = getattr(signal, name, None)
            # Under nohup the run continues without the terminal. SLURM's script ignores SIGUSR1 for itself only.
            if number is not None and not (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
                self._handlers_before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers_before.items():
            # None: not installed by Python, which cannot install it again
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers_before.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            # Launchers pass Ctrl-C on, so one press arrives twice.
            if self._interrupted_at is not None and now - self._interrupted_at > 2:
                raise KeyboardInterrupt
            self._interrupted_at = self._interrupted_at or now
        if self.reason is None:
            self.reason = signal.Signals(number).name
            # print() must not be called here: the signal may have interrupted another print().
            line = (
                f"\n{self.reason}: stopping after this step or the next; then a checkpoint is saved (Ctrl-C "
                f"{'again, after two seconds,' if number == signal.SIGINT else 'twice'} stops at once, without one)\n"
            )
            with contextlib.suppress(OSError):  # after Ctrl-C, `2>&1 | tee` has closed the pipe
                os.write(2, line.encode())

    @property
    def is_requested(self) -> bool:
        """True if this process has a request; other processes may not have one."""
        if self.reason is None:
            if self._deadline is not None and time.monotonic() > self._deadline:
                self.reason = f"max_hours={self._max_hours:g}"
            elif self._launcher is not None and os.getppid() != self._launcher:
                self.reason = "the launcher has gone"
        return self.reason is not None


def ignore_signals() -> None:
    """Ignore signals that request a stop: the run has ended, and a late signal must not change its exit code."""
    for name in _SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
