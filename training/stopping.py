"""Ways to ask a run to stop: it then finishes what the device was given, saves, and says that it wants to go on."""

import os
import signal
import threading
import time

from common.cli import interrupt_exit_code

# sysexits.h, EX_TEMPFAIL: "temporary failure; the user is invited to retry". Its meaning here: resume me.
RESUME_ME = 75
_HOW_TO_QUIT = " (Ctrl-C once more stops at once, without one)"
# SIGUSR1 is what SLURM and others send before a time limit, SIGBREAK is Windows' Ctrl-Break. No system has both.
_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGBREAK")


def exit_code_of_stopping(reason: str) -> int:
    """
    Return RESUME_ME, but 0 under a launcher that mistakes any other code for a crash: one that restarts the run
    (--max_restarts), or accelerate's after Ctrl-C, which prints a traceback.

    Args:
        reason: `StopRequest.reason`.
    """
    if reason == "SIGINT" and interrupt_exit_code() == 0:
        return 0
    return RESUME_ME if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) == 0 else 0


def ignore_signals() -> None:
    """Ignore what asks a run to stop: it has ended, and its exit code is not to become that of a late signal."""
    for name in _SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class StoppedInEvaluation(Exception):
    """Raised out of an evaluation that would take longer than the one who asked may wait."""


class StopRequest:
    """
    Watches for SIGTERM, SIGUSR1, Ctrl-C, a time limit, and the death of the launcher.

    A context manager: leaving it restores the signal handlers that were there before.
    """

    def __init__(self, max_hours, started, say=print):
        """
        Args:
            max_hours: float or None.
            started: time.monotonic() when the program began.
            say: called with a line if signals cannot be watched.
        """
        self.reason = None
        self._say, self._handlers_before = say, {}
        self._deadline = None if max_hours is None else started + 3600 * max_hours
        self._max_hours = max_hours
        self._interrupted_at = None
        # A launcher that is killed leaves its processes running, where nobody sees them or can start again.
        is_launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
        self._launcher = os.getppid() if is_launched else None

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            self._say(
                "warning: training in a thread, which gets no signals: Ctrl-C and SIGTERM do not save a checkpoint "
                "(--max_hours does)"
            )
            return self
        for name in _SIGNALS:
            if hasattr(signal, name):
                number = getattr(signal, name)
                self._handlers_before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error):
        for number, handler in self._handlers_before.items():
            # None: it was installed by other than Python, which cannot install it again
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers_before.clear()

    def _on_signal(self, number, frame):
        now = time.monotonic()
        if number == signal.SIGINT:
            # Launchers pass Ctrl-C on, so that one press arrives twice.
            if self._interrupted_at is not None and now - self._interrupted_at > 2:
                raise KeyboardInterrupt
            self._interrupted_at = self._interrupted_at or now
        if self.reason is None:
            self.reason = signal.Signals(number).name
            # Not print(), which cannot be entered again where the signal came in the middle of a print().
            os.write(
                2, f"\n{self.reason}: stopping after this step; then a checkpoint is saved{_HOW_TO_QUIT}\n".encode()
            )

    @property
    def is_requested(self):
        """Whether this process has been asked; others may not have been."""
        if self.reason is None:
            if self._deadline is not None and time.monotonic() > self._deadline:
                self.reason = f"max_hours={self._max_hours:g}"
            elif self._launcher is not None and os.getppid() != self._launcher:
                self.reason = "the launcher has gone"
        return self.reason is not None

    def check(self, *_):
        """Raises StoppedInEvaluation if stopping was asked for."""
        if self.is_requested:
            raise StoppedInEvaluation
