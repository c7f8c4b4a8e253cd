"""The terminal: progress bars, its title, and Ctrl-C under `accelerate launch`."""

import atexit
import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

# Terminals that would print a title's text, or have no place for one.
_WITHOUT_TITLE = ("", "dumb", "linux", "unknown")


def progress_bar(iterable: Iterable[Any] | None = None, *, is_shown: bool = True, **options: Any) -> "tqdm[Any]":
    """Return a bar of tqdm: on a terminal, or as a widget in a notebook with ipywidgets. Anywhere else, it is disabled.

    A notebook without ipywidgets gets none, since each log line would begin a new bar of text there.

    Args:
        is_shown: False disables the bar everywhere.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the advice to install ipywidgets
        from tqdm import auto
    is_widget = auto.notebook_tqdm is not auto.std_tqdm
    bar: tqdm[Any] = auto.tqdm(iterable, disable=not (is_shown and (is_widget or sys.stderr.isatty())), **options)
    return bar


class TerminalTitle:
    """Title of the terminal's window or tab, for a few words of status. Does nothing without such a terminal."""

    def __init__(self, *, is_shown: bool = True) -> None:
        has_title = is_shown and os.name != "nt" and os.environ.get("TERM", "") not in _WITHOUT_TITLE
        self._stream = next((s for s in (sys.stderr, sys.stdout) if has_title and s.isatty()), None)
        self._is_set = False

    def set(self, text: str) -> None:
        """Replace the title. The first call makes the terminal remember the one before, if it can."""
        self._write(("" if self._is_set else "\x1b[22;0t") + f"\x1b]0;{text}\x07")
        self._is_set = True

    def restore(self) -> None:
        """Clear the title, and then take back the one before. A second call does nothing."""
        if self._is_set:
            self._write("\x1b]0;\x07\x1b[23;0t")
        self._is_set = False

    def _write(self, sequence: str) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError, ValueError):  # the terminal is gone
                self._stream.write(sequence)
                self._stream.flush()


def is_launched() -> bool:
    """Return True if `accelerate launch` started this process."""
    return "ACCELERATE_DYNAMO_BACKEND" in os.environ  # other variables of the launcher are set by users, too


def take_terminal() -> bool:
    """Make Ctrl-C reach only this process, if accelerate's launcher started it alone and from a shell.

    The launcher does not handle Ctrl-C: it prints a traceback and returns to the shell's prompt while this process
    still saves a checkpoint. So this process makes its own process group the terminal's foreground group, as a shell
    does with each job.

    Returns:
        True if it did. False on Windows, without a terminal, in a script or in the background, and with several
        processes, which torchrun starts in sessions of their own.
    """
    launcher = os.getppid()
    if not hasattr(os, "tcsetpgrp") or not is_launched():
        return False
    try:
        terminal = os.open(os.ctermid(), os.O_RDWR)
    except OSError:  # there is none
        return False
    # The shell made the launcher the leader of a job of its own, and the job is in the foreground.
    if not os.getpgrp() == launcher == os.tcgetpgrp(terminal):
        os.close(terminal)
        return False
    # A background process may set the terminal's foreground group only while it ignores this signal.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)

    def take() -> None:
        os.setpgid(0, 0)
        os.tcsetpgrp(terminal, os.getpgrp())

    def give_back() -> None:
        os.setpgid(0, launcher)
        os.tcsetpgrp(terminal, launcher)

    def on_suspend(*_: object) -> None:
        """Ctrl-Z: stop together with the launcher, whose job the shell knows; `fg` continues both."""
        give_back()
        os.killpg(launcher, signal.SIGSTOP)
        if os.tcgetpgrp(terminal) == launcher:  # not after `bg`
            take()

    def at_exit() -> None:
        with contextlib.suppress(OSError):  # the launcher or the terminal is gone
            give_back()

    try:
        take()
    except OSError:  # a terminal that does not allow it: Ctrl-C then reaches the launcher as well
        with contextlib.suppress(OSError):
            os.setpgid(0, launcher)
        os.close(terminal)
        return False
    signal.signal(signal.SIGTSTP, on_suspend)
    atexit.register(at_exit)
    return True
