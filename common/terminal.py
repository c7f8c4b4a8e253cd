"""Ctrl-C under `accelerate launch`: it reaches the command, and not the launcher above it."""

import atexit
import contextlib
import os
import signal


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
    if not hasattr(os, "tcsetpgrp") or "ACCELERATE_MIXED_PRECISION" not in os.environ:
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
