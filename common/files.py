"""Files that are whole or not there: written under another name, flushed to the disk, renamed."""

import errno
import json
import math
import os
from pathlib import Path


def write_aside(path, text):
    """Writes a text file under another name, then renames it."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    flush_to_disk(aside)
    aside.replace(path)


def write_json(path, value):
    """Writes a JSON file under another name, then renames it; null where a number is not finite."""
    write_aside(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def flush_to_disk(path):
    """Waits until a file, or the names in a folder, are on the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Windows cannot open a folder, and some network disks cannot flush one: there a rename has to do by itself.
        if not (Path(path).is_dir() and error.errno in (errno.EACCES, errno.EINVAL)):
            raise


def finite(value):
    """The same dict, list or number with None in the place of NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
