"""
Other systems, simulated on Linux: each condition is a context manager that changes this process alone.

Each simulates the error that the other system gives; docs/training.md has the list.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import signal
from pathlib import Path
from unittest import mock


@contextlib.contextmanager
def no_locks():
    """NFS without its lock service."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with mock.patch.object(fcntl, "flock", refuse):
        yield


@contextlib.contextmanager
def no_links_and_no_sigusr1():
    """Windows without developer mode; links alone: FAT, many cloud drives."""

    def refuse(*_, **__):
        raise OSError(errno.EPERM, "a required privilege is not held by the client")

    number = signal.SIGUSR1
    del signal.SIGUSR1
    try:
        with mock.patch.object(os, "symlink", refuse), mock.patch.object(os, "link", refuse):
            yield
    finally:
        signal.SIGUSR1 = number


@contextlib.contextmanager
def windows_flushing():
    """Windows: folders cannot be opened, and files that are open for reading only cannot be flushed."""
    fsync, open_file = os.fsync, os.open

    def flush(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        fsync(descriptor)

    def open_no_folder(path, *arguments, **more):
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return open_file(path, *arguments, **more)

    with (
        mock.patch.object(os, "fsync", flush),
        mock.patch.object(os, "open", open_no_folder),
        mock.patch.object(shutil, "_use_fd_functions", False),  # rmtree's way where folders can be opened
    ):
        yield


@contextlib.contextmanager
def windows_renaming():
    """Windows: folders and links to them are not replaced, and what is open or mapped keeps its name."""

    def checked(change):
        def checked(path, *arguments, **more):
            if more.get("dir_fd") is None and more.get("src_dir_fd") is None:
                for name in (path, *arguments[:1]):
                    if name is not None and (user := user_of(name)):
                        raise PermissionError(errno.EACCES, f"in use: {user}", os.fspath(name))
                if change is os_replace and Path(arguments[0]).is_dir():
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(arguments[0]))
            return change(path, *arguments, **more)

        return checked

    os_replace = os.replace
    with contextlib.ExitStack() as patches:
        for name in ("replace", "rename", "unlink", "remove"):
            patches.enter_context(mock.patch.object(os, name, checked(getattr(os, name))))
        yield


def user_of(path):
    """Return the name of a file, or of a file in a folder, that this process has open or mapped; None if it has not."""
    path = os.path.realpath(path)
    maps = Path("/proc/self/maps").read_text().splitlines()
    names = {line.split(maxsplit=5)[5] for line in maps if "/" in line}
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that lists the folder
            names.add(str(descriptor.readlink()))
    # filelock opens its file so that it can be removed, on Windows too
    return next((n for n in names if (n == path or n.startswith(path + os.sep)) and not n.endswith("lock")), None)


@contextlib.contextmanager
def umask_027():
    """A group that shares its files."""
    before = os.umask(0o027)
    try:
        yield
    finally:
        os.umask(before)


ALL = (no_locks, no_links_and_no_sigusr1, windows_flushing, windows_renaming, umask_027)


def modes(folder):
    """{permissions of the files in a folder}"""
    return {oct(path.stat().st_mode & 0o777) for path in Path(folder).rglob("*") if path.is_file()}
