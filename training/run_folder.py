"""A run's folder has one run in it at a time, and says how it stands."""

import os
from pathlib import Path

from filelock import FileLock, Timeout

from training import TrainingError
from training.files import write_json

_PATIENCE_S = 60
_held = []


def lock(output_dir, say):
    """
    Keeps other runs out of the folder until `unlock`, or until this process ends, however it ends. A run that was just
    asked to stop gets a minute for it.

    Raises:
        TrainingError: another process does not leave.
    """
    output_dir = Path(output_dir)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, which is made only when nothing can be wrong any more.
    lock_file = FileLock(output_dir.with_name(f".{output_dir.name}.lock"))
    _held.append(lock_file)
    try:
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


def unlock():
    """Lets others in."""
    while _held:
        _held.pop().release()


def write_status(output_dir, status, **more):
    """
    status.json, for scripts: launchers do not pass on the exit code of what they launch.

    Args:
        status: "running" (or killed), "resume me", "failed" or "finished".
    """
    write_json(Path(output_dir) / "status.json", {"status": status, "pid": os.getpid(), **more})
