"""Make a folder once per launch, before its processes have met: the main process makes it, the others wait.

A process group would end long work by its timeout. So the processes share two things on the disk, next to the folder:
a lock, which lets one of several launches work, and the main process's note ("making" or "failed", and who wrote it).
The others return when the folder is done, and end when the note says "failed" or its writer is gone. How none of
them waits in vain, or ends without cause:

- They look at the note before the folder: a main process that is gone after a success has left a finished folder.
- Launches at the same time have different master ports, and so notes of their own.
- A note from before this process is an earlier launch's, unless its writer is alive (this process started late).
- Killed before its note: the others give up after five minutes without one.
- A process on another machine cannot see if the writer is alive: "failed" gets there through the shared disk, and the
  launcher ends what waits for a killed process. A disk that is not shared has no note.
"""

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import psutil

from common.cli import is_main_process, say
from common.errors import UserError
from common.files import write_json
from common.locks import Lock, Timeout

_POLL_SECONDS, _LINE_SECONDS, _NOTE_SECONDS = 0.3, 30.0, 300.0


def make_once(folder: Path, is_done: Callable[[], bool], make: Callable[[], object]) -> None:
    """Call `make` on the main process (RANK 0), unless the folder is done. Every process of the launch calls this.

    Raises:
        UserError: the main process failed or was killed. Only one process per machine raises it, the others exit.
    """
    if is_done():
        return
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    launch = re.sub(r"[^\w.-]", "_", "-".join(os.environ.get(name, "0") for name in names))
    note = folder.with_name(f".{folder.name}.{launch}.json")
    if not is_main_process():
        _wait(folder, is_done, note)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The note is for the launch's other processes. Without a launcher there are none, and two runs would share a note.
    report = _report(note) if "RANK" in os.environ else contextlib.nullcontext()
    with report, _locked(folder):
        if not is_done():
            if int(os.environ.get("GROUP_WORLD_SIZE") or os.environ.get("SLURM_NNODES") or 1) > 1:
                say(f"data      several machines: {folder.parent.absolute()} must be a folder that they share")
            make()
    for path in folder.parent.glob(f".{folder.name}.*.json"):  # also those of killed launches
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _report(note: Path) -> Iterator[None]:
    """Write a note for the other processes: this one works, or has failed."""
    writer = {"machine": _machine(), "pid": os.getpid(), "started": psutil.Process().create_time()}
    write_json(note, {"state": "making", "time": time.time(), **writer})
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            write_json(note, {"state": "failed", "time": time.time(), **writer})
        raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; another launch may have it for hours."""
    lock, timeout = Lock(folder.with_name(f".{folder.name}.lock"), warn=say), 0.0
    while True:
        try:
            lock.acquire(timeout)
            break
        except Timeout:
            say(f"data      another run makes {folder}; waiting for it")
            timeout = _LINE_SECONDS
    try:
        yield
    finally:
        lock.release()


def _wait(folder: Path, is_done: Callable[[], bool], note: Path) -> None:
    rank = os.environ["RANK"]
    prints_lines = rank == "1" or os.environ.get("LOCAL_RANK") == "0"  # one process per machine prints
    started = psutil.Process().create_time()
    last_note = last_line = time.monotonic()
    while True:
        state, now = _state(note, started), time.monotonic()
        if is_done():
            return
        if state == "ended" or (state == "missing" and now - last_note > _NOTE_SECONDS):
            break
        last_note = now if state == "making" else last_note
        if prints_lines and now - last_line > _LINE_SECONDS:
            print(f"data      process {rank} waits until the main process has made {folder}", flush=True)
            last_line = now
        time.sleep(_POLL_SECONDS)
    if not prints_lines:
        raise SystemExit(1)
    if state == "ended":
        raise UserError(f"{folder} was not made: the main process (RANK 0) has failed or was killed")
    raise UserError(
        f"nothing makes {folder}: {folder.parent.absolute()} has no sign of the main process (RANK 0). Several "
        f"machines need a folder that they share, or a finished {folder.name} on each"
    )


def _state(note: Path, started: float) -> Literal["making", "ended", "missing"]:
    """Return what the note says about this launch, in which this process started at `started`."""
    try:
        writer = json.loads(note.read_text(encoding="utf-8"))
    except OSError:
        return "missing"
    # Two seconds: the time at which a process started is known to within one.
    state: Literal["ended", "missing"] = "ended" if writer["time"] > started - 2 else "missing"
    if writer["state"] == "failed" or (writer["machine"] == _machine() and not _is_alive(writer)):
        return state
    return "making"


def _is_alive(writer: dict) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(writer["pid"])
        is_same = abs(process.create_time() - writer["started"]) < 5  # process ids are used again
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    return False


def _machine() -> str:
    """Name this machine, or the container on it, in which a process id has a meaning."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()
