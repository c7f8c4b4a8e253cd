"""
Run programs in fresh processes on a terminal (a pty), as a user starts them, with none of this project imported.

Starting Python with torch and transformers takes seconds. `Forks` imports them once, in a process that only waits,
and forks each program's process from it; `run_on_terminal` starts a command from scratch.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

# The end of transformers' question whether to run a checkpoint's code.
QUESTION = "[y/N]"

# Submodules that transformers imports at first use, by nearly every program.
_PRELOADED = ("transformers.pipelines", "transformers.models.auto", "transformers.models.gpt2")


class Finished(NamedTuple):
    """The output of a program on its terminal, and its exit code (negative: the signal that killed it)."""

    output: str
    returncode: int


def run_on_terminal(command: list[str], *, cwd: Path, environment: dict[str, str], timeout: float = 120) -> Finished:
    """Start a command on a terminal of its own, where nothing is typed, and wait for its end."""
    terminal, inside = os.openpty()
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stdin=inside, stdout=inside, stderr=inside, start_new_session=True
    )
    os.close(inside)
    return _watch(process.pid, terminal, timeout)


def _watch(pid: int, terminal: int, timeout: float) -> Finished:
    """Read a terminal until its program has ended. After `timeout` seconds or at a question, the program is killed."""
    output, end = b"", time.monotonic() + timeout
    while True:
        is_late = time.monotonic() > end
        if is_late or QUESTION.encode() in output:
            os.kill(pid, signal.SIGKILL)
            output += f"\n(killed: {'timeout' if is_late else 'it asks'})\n".encode()
            break
        if not select.select([terminal], [], [], 1)[0]:
            continue
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        output += piece
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    return Finished(output.decode(errors="replace").replace("\r\n", "\n"), os.waitstatus_to_exitcode(status))


class Forks:
    """Context manager that runs Python programs in forks of one process, which has imported torch and transformers."""

    def __init__(self, environment: dict[str, str], cwd: Path):
        """
        Args:
            environment: of all programs.
            cwd: a folder without this project's modules, for the process that the others are forked from.
        """
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            cwd=cwd,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, program: str, *arguments: str, cwd: Path, timeout: float = 120) -> Finished:
        """Run a program as `python -c PROGRAM ARGUMENTS` in `cwd` would, and wait for its end."""
        request = {"program": program, "arguments": [*map(str, arguments)], "cwd": str(cwd), "timeout": timeout}
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return Finished(*json.loads(self._server.stdout.readline()))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.kill()  # it has nothing to lose, and taking torch apart takes seconds
        self._server.communicate()


def _serve() -> None:
    """Answer the requests on stdin, one per line, until it is closed."""
    import importlib

    import torch

    for name in _PRELOADED:
        importlib.import_module(name)
    torch.set_num_threads(1)  # a fork has only the thread that forked
    for line in sys.stdin:
        request = json.loads(line)
        pid, terminal = os.forkpty()
        if pid == 0:
            _be_a_program(request)
        print(json.dumps(_watch(pid, terminal, request["timeout"])), flush=True)


def _be_a_program(request: dict) -> None:
    """Run the program as `__main__` in the forked process, on the terminal, and exit."""
    import types

    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    os.chdir(request["cwd"])
    sys.argv[:] = ["-c", *request["arguments"]]
    sys.path[0] = ""  # not this file's folder
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    code = 0
    try:
        exec(compile(request["program"], "<program>", "exec"), main.__dict__)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if not isinstance(stop.code, int | None):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
