"""Write files atomically: under another name, flushed to the disk, then renamed."""

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Some network disks cannot flush.
_CANNOT_FLUSH = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
# Windows cannot open a folder at all, and flushes through writable descriptors only.
_CANNOT_FLUSH_FOLDERS = _CANNOT_FLUSH | {errno.EACCES, errno.EPERM, errno.EISDIR, errno.EBADF}
# On Windows a file that another program reads at the moment (a virus scanner, a viewer) cannot be replaced.
_PATIENCE_SECONDS = 2.0 if os.name == "nt" else 0.0


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Give the path of a file to write next to `path`; after the block it is flushed and renamed to `path`.

    If the block raises, the file is removed and `path` is unchanged.
    """
    path = Path(path)
    tmp_path = path.with_name(f".{path.name}.partial")
    try:
        yield tmp_path
        flush_to_disk(tmp_path)
        replace_file(tmp_path, path)
    except BaseException:
        with contextlib.suppress(OSError):
            tmp_path.unlink()
        raise


def write_text_atomically(path: str | os.PathLike, text: str) -> None:
    """Write a text file under another name, then rename it. Lines end with a line feed on every system."""
    with atomic_write(path) as tmp_path:
        tmp_path.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write a JSON file under another name, then rename it; null replaces numbers that are not finite."""
    write_text_atomically(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Return the object in a JSON file, an empty one if the file is missing or damaged."""
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    return {}


def replace_file(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Rename a file over another one; on Windows wait a moment while another program holds the old one open."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            Path(source).replace(target)
            return
        except PermissionError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.05)


def flush_to_disk(path: str | os.PathLike) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    is_folder = Path(path).is_dir()
    try:
        # Windows flushes through writable descriptors only; a folder can be opened for reading only.
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (_CANNOT_FLUSH_FOLDERS if is_folder else _CANNOT_FLUSH):
            raise


def apply_umask(folder: str | os.PathLike) -> None:
    """Give all files in a folder the permissions that a new file there gets.

    safetensors writes its files as 0600 whatever the umask, and copied code keeps the permissions of its source.
    """
    folder = Path(folder)
    probe = folder / ".permissions"  # asking os.umask would set it for all threads
    # Not every disk has permissions that can be changed, and none of this is worth losing a checkpoint for.
    with contextlib.suppress(OSError):
        probe.touch()
        mode = probe.stat().st_mode & 0o777
        probe.unlink()
        for path in folder.rglob("*"):
            if path.is_file() and path.stat().st_mode & 0o777 != mode:
                path.chmod(mode)


def finite(value: Any) -> Any:
    """Return the same dict, sequence or number with None in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
