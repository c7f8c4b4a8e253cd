"""
Run programs in fresh processes, as a user starts them, with none of this project imported.

Starting Python with torch and transformers takes seconds. `Forks` imports them once, in a process that only waits,
and forks each program's process from it; `run_on_terminal` starts a command from scratch, on a terminal (a pty).
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# The end of transformers' question whether to run a checkpoint's code.
QUESTION = "[y/N]"

# Submodules that transformers imports at first use, by nearly every program.
_PRELOADED = ("transformers.pipelines", "transformers.models.auto", "transformers.models.gpt2", "accelerate")


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
        return Finished(*self._ask(request))

    def run_script(
        self, command: list[str], *, cwd: Path, environment: dict[str, str], timeout: float = 300
    ) -> subprocess.CompletedProcess:
        """Run `python COMMAND` (a script, -m or -c, and its arguments) without a terminal, and wait for its end.

        Args:
            environment: added to that of all programs; libraries that are imported already do not see it.
        """
        with tempfile.TemporaryDirectory() as folder:
            paths = [f"{folder}/stdout", f"{folder}/stderr"]
            request = {"command": command, "cwd": str(cwd), "timeout": timeout, "outputs": paths}
            [returncode] = self._ask({**request, "environment": environment})
            outputs = [Path(path).read_text(errors="replace") for path in paths]
        if returncode is None:
            raise subprocess.TimeoutExpired(command, timeout, *outputs)
        return subprocess.CompletedProcess(command, returncode, *outputs)

    def _ask(self, request: dict) -> list:
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())

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
        if "command" in request:
            pid = os.fork()
            if pid == 0:
                _be_a_script(request)
            print(json.dumps([_wait(pid, request["timeout"])]), flush=True)
            continue
        pid, terminal = os.forkpty()
        if pid == 0:
            _be_a_program(request)
        print(json.dumps(_watch(pid, terminal, request["timeout"])), flush=True)


def _wait(pid: int, timeout: float) -> int | None:
    """Wait for the end of a process and return its exit code; kill it after `timeout` seconds and return None."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _be_a_script(request: dict) -> None:
    """Run the command in the forked process, with its output in files, and exit."""
    import runpy

    os.setsid()
    for number, path in enumerate([os.devnull, *request["outputs"]]):
        file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    first, *arguments = request["command"]
    if first == "-c":
        program, *arguments = arguments
        _run(lambda: _exec(program), argv=["-c", *arguments], path="")
    elif first == "-m":
        name, *arguments = arguments
        run = lambda: runpy.run_module(name, run_name="__main__", alter_sys=True)  # noqa: E731
        _run(run, argv=[name, *arguments], path=request["cwd"])
    else:
        path = Path(first).resolve()
        _run(lambda: runpy.run_path(str(path), run_name="__main__"), argv=[first, *arguments], path=str(path.parent))


def _be_a_program(request: dict) -> None:
    """Run the program as `__main__` in the forked process, on the terminal, and exit."""
    os.chdir(request["cwd"])
    _run(lambda: _exec(request["program"]), argv=["-c", *request["arguments"]], path="")


def _exec(program: str) -> None:
    import types

    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(program, "<program>", "exec"), main.__dict__)


def _run(program: Callable[[], object], *, argv: list[str], path: str) -> None:
    """Call a program in place of this one, with its `sys.argv` and the first entry of its `sys.path`, and exit."""
    import atexit

    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    sys.argv[:] = argv
    more = os.environ.get("PYTHONPATH")
    sys.path[:1] = [path, *(more.split(os.pathsep) if more else [])]  # in place of this file's folder
    code = 0
    try:
        program()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if not isinstance(stop.code, int | None):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
