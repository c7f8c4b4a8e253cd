"""Shared by all commands: the argument parser, the output streams, errors on one line, Ctrl-C.

This module imports nothing heavy, so that a command can call `prepare_process` before its own imports.
"""

import argparse
import contextlib
import errno
import gc
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NoReturn

from common.errors import UserError, one_line
from common.terminal import take_terminal

# The first is the name since torch 2.9. torch reads the others, too.
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")

_has_terminal = False  # taken over from accelerate's launcher


class Parser(argparse.ArgumentParser):
    """An argument parser whose usage errors are UserErrors: one line, as for every other mistake."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError for a malformed command line."""
        raise UserError(f"{message} (see {self.prog} --help)")


def prepare_process() -> None:
    """Prepare the output streams and the GPU's allocator, and make Ctrl-C one line. Call it before other imports.

    Characters that the console does not have (cp1252, ASCII, a redirected log on Windows) are printed as escapes.
    """
    global _has_terminal
    _use_utf8_for_paths()
    _use_expandable_segments()
    gc.disable()  # until run_command: looking for garbage among the imported modules takes half a second
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where a test or a notebook has replaced it
            stream.reconfigure(errors="backslashreplace")
    _has_terminal = _has_terminal or take_terminal()
    sys.excepthook = _on_unhandled_exception


def interrupt_exit_code() -> int:
    """Return the exit code for Ctrl-C: 130 as in shells, but 0 under accelerate's launcher at a terminal.

    The launcher prints a traceback for any other code.
    """
    return 0 if _has_terminal else 128 + signal.SIGINT


def _use_utf8_for_paths() -> None:
    """Restart this command in Python's UTF-8 mode if the locale has another encoding (ISO-8859-1, some LC_ALL=C).

    The tokenizers package and other libraries take paths as UTF-8 only. The streams keep their encoding.
    """
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    encoding = os.environ.get("PYTHONIOENCODING") or f"{getattr(sys.stdout, 'encoding', 'utf-8')}:backslashreplace"
    environment = os.environ | {"PYTHONUTF8": "1", "PYTHONIOENCODING": encoding}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _use_expandable_segments() -> None:
    """Let torch's CUDA allocator grow its segments, which wastes less memory, unless the user has set the allocator.

    torch reads the variable when it is imported. Windows does not support such segments.
    """
    if os.name != "nt" and not any(name in os.environ for name in _ALLOCATOR_VARIABLES):
        os.environ[_ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def is_main_process() -> bool:
    """Return True on the first process of a launch, which is also the only one without a launcher."""
    return os.environ.get("RANK", "0") == "0"


def say(line: str = "") -> None:
    """Print a line on the main process, above a progress bar. A full disk or a closed pipe does not end the program."""
    from tqdm import tqdm

    if is_main_process():
        with contextlib.suppress(OSError):
            tqdm.write(encodable(line))


def encodable(text: str) -> str:
    """Return the text as standard output can print it, with escapes for characters that it does not have."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _on_unhandled_exception(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """End with one line where Ctrl-C came during the imports."""
    if issubclass(kind, KeyboardInterrupt):
        print_interrupted("interrupted")
        if _has_terminal:
            os._exit(interrupt_exit_code())  # Python's own code would be the signal's
    else:
        sys.__excepthook__(kind, error, traceback)


def run_command(
    command: Callable[[Sequence[str] | None], int | None],
    arguments: Sequence[str] | None = None,
    *,
    on_interrupt: str = "interrupted; nothing was written",
) -> int:
    """Run a command and return its exit code. An error that the user can fix becomes one line on stderr.

    Args:
        command: takes the arguments (None: those of the command line), returns an exit code (None: 0).
        on_interrupt: the line for Ctrl-C.
    """
    if not gc.isenabled():  # see prepare_process
        gc.freeze()
        gc.enable()
    try:
        return command(arguments) or 0
    except UserError as error:
        print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        print_interrupted(on_interrupt)
        return interrupt_exit_code()
    except BrokenPipeError:  # the reader of our output has closed it, as `head` does
        with contextlib.suppress(OSError):  # where standard output is not a file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout at exit
        return 128 + 13  # SIGPIPE, which Windows does not name
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print_error(f"no space left on the disk for {error.filename or 'the output'}: make room there")
        return 1


def shell_quote(argument: object) -> str:
    """Quote an argument of a command that is printed for the user to copy, as the shell of this system wants it."""
    return subprocess.list2cmdline([str(argument)]) if os.name == "nt" else shlex.quote(str(argument))


def check_world_size(num_processes: int) -> None:
    """Raise UserError if the launcher started more processes than the `num_processes` that work together."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched == num_processes and int(os.environ.get("RANK", "0")) >= num_processes:
        raise UserError(f"RANK={os.environ['RANK']} is set, but there are {num_processes} process(es): unset it")
    if launched != num_processes:
        raise UserError(
            f"the launcher started {launched} processes, but this one sees {num_processes}: each would do all the work "
            "alone. Launch with one of accelerate_configs/*.yaml that fits this machine"
        )


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def print_interrupted(text: str) -> None:
    """Print what Ctrl-C led to, on a terminal below the ^C that it shows."""
    print(f"{chr(10) if sys.stderr.isatty() else ''}{text}", file=sys.stderr)
    if sys.excepthook is _on_unhandled_exception:  # by prepare_process: this process is ours
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C while Python exits would print a traceback


def print_error(error: BaseException | str) -> None:
    """Print "error: ..." on one line of stderr, with the process's rank if it is not the first of several."""
    rank = os.environ.get("RANK", "0")
    who = "error" if rank == "0" else f"error (process {rank})"
    text = error if isinstance(error, str) else one_line(error, max_length=4000)
    print(f"{who}: {text}", file=sys.stderr)
