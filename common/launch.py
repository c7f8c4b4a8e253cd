"""Make a folder once per launch, before its processes have met: the main process makes it, the others wait.

A process group would end long work by its timeout. So the main process holds a lock next to the folder while it works.
Another launch waits for the lock. The launch's other processes wait for the folder; usually their launcher ends them if
the main process fails or is killed. Where it does not, or where machines do not share the folder, they give up after
five minutes in which nothing has held the lock.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

from common.cli import is_main_process, say
from common.errors import UserError
from common.locks import Lock, Timeout

_POLL_SECONDS, _LINE_SECONDS, _PATIENCE_SECONDS = 0.3, 30.0, 300.0


def make_once(folder: Path, is_done: Callable[[], bool], make: Callable[[], object]) -> None:
    """Call `make` on the main process (RANK 0), unless the folder is done. Every process of the launch calls this.

    Raises:
        UserError: nothing makes the folder that this process waits for.
    """
    if is_done():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder.with_name(f".{folder.name}.lock"))
    if not is_main_process():
        _wait(folder, is_done, lock)
        return
    timeout = 1.0  # longer than a waiting process holds the lock to look
    while True:
        try:
            lock.acquire(timeout)
            break
        except Timeout:
            say(f"data      another run makes {folder}; waiting for it")
            timeout = _LINE_SECONDS
    try:
        if not is_done():
            if int(os.environ.get("GROUP_WORLD_SIZE") or os.environ.get("SLURM_NNODES") or 1) > 1:
                say(f"data      several machines: {folder.parent.absolute()} must be a folder that they share")
            make()
    finally:
        lock.release()


def _wait(folder: Path, is_done: Callable[[], bool], lock: Lock) -> None:
    rank = os.environ["RANK"]
    prints_lines = rank == "1" or os.environ.get("LOCAL_RANK") == "0"  # one process per machine prints
    last_held = last_line = time.monotonic()
    while not is_done():
        now = time.monotonic()
        try:
            is_held = not lock.acquire(0)  # on a disk without locks nothing can be seen: wait for the launcher
            lock.release()
        except Timeout:
            is_held = True
        last_held = now if is_held else last_held
        if now - last_held > _PATIENCE_SECONDS:
            raise UserError(
                f"nothing makes {folder}: the main process (RANK 0) has failed or was killed, or it does not see "
                f"{folder.parent.absolute()}. Several machines need a folder that they share, or a finished "
                f"{folder.name} on each"
            )
        if prints_lines and now - last_line > _LINE_SECONDS:
            print(f"data      process {rank} waits until the main process has made {folder}", flush=True)
            last_line = now
        time.sleep(_POLL_SECONDS)
