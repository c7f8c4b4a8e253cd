"""Files that are whole or not there: written under another name, flushed to the disk, renamed."""

import contextlib
import json
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
    """Writes a JSON file under another name, then renames it."""
    write_aside(path, json.dumps(value, indent=2) + "\n")


def flush_to_disk(path):
    """Waits until a file, or the names in a folder, are on the disk."""
    # Windows cannot fsync a folder; its rename is already durable enough.
    with contextlib.suppress(PermissionError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
