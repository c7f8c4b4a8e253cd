"""A run's folder has one run in it at a time, and status.json says how it stands."""

import contextlib
import json
import os
from pathlib import Path

from filelock import FileLock, Timeout

from common.files import write_json
from training import TrainingError

_PATIENCE_S = 60
_held = []  # this process's locks
_running = []  # the folder of the run that this process has begun


def lock(output_dir, say):
    """
    Keeps other runs out of the folder until this process ends, however it ends. A run that was just
    asked to stop gets a minute for it.

    Raises:
        TrainingError: another process does not leave, or there cannot be such a folder.
    """
    output_dir = Path(output_dir).absolute()
    if not output_dir.name:
        raise TrainingError(f"output_dir={str(output_dir)!r} is no folder for a run; name one below it")
    # Beside the folder, which is made only when nothing can be wrong any more.
    lock_file = FileLock(output_dir.with_name(f".{output_dir.name}.lock"))
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        if output_dir.exists() and not output_dir.is_dir():
            raise NotADirectoryError(f"{output_dir} is a file")
        lock_file.acquire(timeout=0)
    except NotImplementedError:  # a file system without locks
        say(f"warning: {output_dir.parent} has no locks: nothing keeps a second run out of {output_dir}")
    except Timeout:
        say(f"run       another process is at work in {output_dir}; waiting for it to leave")
        try:
            lock_file.acquire(timeout=_PATIENCE_S)
        except Timeout:
            raise TrainingError(
                f"another process is training in {output_dir}: wait for it, stop it, or choose another --output_dir"
            ) from None
    except OSError as error:
        raise TrainingError(f"output_dir={output_dir} cannot be written to ({error}); choose another one") from None
    _held.append(lock_file)


def release():
    """Lets others in before this process ends, which does so too: then nothing can be writing there any more."""
    while _held:
        _held.pop().release()


def begin(output_dir, is_main):
    """Every process calls it when nothing can be wrong any more: status "running", written by the main one."""
    if is_main:
        write_status(output_dir, "running")
    _running[:] = [output_dir]


def fail():
    """Write status "failed" where a run had begun, and return whether one had. Any process may call it."""
    for output_dir in _running:
        with contextlib.suppress(OSError):
            write_status(output_dir, "failed")
    return bool(_running)


def write_status(output_dir, status, **more):
    """
    status.json, for scripts: launchers do not pass on the exit code of what they launch.

    Args:
        status: "running" (or killed), "resume me", "failed" (somebody must mend something first) or "finished".
    """
    write_json(Path(output_dir) / "status.json", {"status": status, "pid": os.getpid(), **more})


def write_finished(output_dir, checkpoint, step, val_loss):
    """Status "finished", unless it says so already."""
    path = Path(output_dir) / "status.json"
    with contextlib.suppress(OSError, ValueError):
        if json.loads(path.read_text(encoding="utf-8"))["status"] == "finished":
            return
    write_status(output_dir, "finished", step=step, val_loss=val_loss, checkpoint=str(checkpoint))
