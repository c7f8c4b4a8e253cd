"""One process at a time: locks on files, and what happens on disks that have none."""

import errno
import os
import sys
from pathlib import Path

from filelock import FileLock, Timeout

from common.cli import is_main_process

__all__ = ["Lock", "Timeout"]

# What flock answers on NFS without its lock service, and on other network disks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_disks_without_locks: set[int] = set()  # those that this process has warned of


class Lock:
    """An exclusive lock between processes, held until it is released or the process ends.

    `path` is the lock's file, created if it does not exist. On a disk without locks, the lock counts as acquired, and
    the main process prints a warning on stderr, once per disk.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self._path = Path(path)
        try:
            # A lock that is a mere file stays after a kill, and keeps every later run out.
            self._lock = FileLock(path, fallback_to_soft=False)
        except TypeError:  # a filelock without that option
            self._lock = FileLock(path)

    def acquire(self, timeout: float = -1) -> bool:
        """Wait up to `timeout` seconds for the lock (-1: without end). Return False on a disk without locks.

        Raises:
            Timeout: another process holds it.
            OSError: the file cannot be opened.
        """
        try:
            self._lock.acquire(timeout=timeout)
            return True
        except (OSError, NotImplementedError) as error:
            if not isinstance(error, NotImplementedError) and error.errno not in _NO_LOCKS:
                raise
            folder = self._path.parent
            disk = folder.stat().st_dev
            if disk not in _disks_without_locks and is_main_process():
                _disks_without_locks.add(disk)
                print(
                    f"warning: the disk of {folder} has no locks ({error or 'not implemented'}): nothing keeps a "
                    "second process out, so do not start one in the same folder",
                    file=sys.stderr,
                )
            return False

    def release(self) -> None:
        """Let other processes in; does nothing if the lock is not held."""
        self._lock.release()
