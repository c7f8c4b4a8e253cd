"""`train.py --text`: the shards of a text, in a folder named by its content. Only this file knows how they are made."""

import glob
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from common.cli import available_cores, say
from common.errors import UserError
from common.jsonl import name_unreadable_file
from common.launch import make_once
from data import DataError
from data.hub import DatasetSource, find_commit
from data.manifest import FORMAT_VERSION, MANIFEST, PREPARING, read_manifest
from data.prepare import VAL_FRACTION, prepare
from data.sources import FileSource, file_kind
from data.tokenizer import GPT2

CACHE = Path("shards")
_HASHED_BYTES = 2**30  # read in a second or two; reading 100 GB at every start would take minutes


def prepare_text(text: str, *, is_dry_run: bool = False) -> str:
    """Return the folder of a text's shards; make it first if it is not there. Every process of a launch calls this.

    A text is a file, a folder, a pattern like "notes/**/*.txt", or the id of a data set on the Hub. A dry run only
    returns the folder's name.
    """
    try:
        source, content = _open_text(text)
    except OSError as error:
        raise DataError(f"text={text} cannot be read: {error.strerror or error}") from error
    settings = {key: value for key, value in source.settings.items() if key != "paths"}
    decisive = [content, settings, VAL_FRACTION, GPT2.sha256, FORMAT_VERSION]
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    name = _name_of(text)
    out = CACHE / f"{name}-{digest[:12]}"

    def make() -> None:
        say(f"data      preparing {text} in {out}")
        started = read_manifest(out, PREPARING)
        if started is not None and started.source.get("paths") != source.settings.get("paths"):
            shutil.rmtree(out)  # the text was moved since: the tasks name its old place
        prepare(source, out, name=name, num_proc=available_cores(), log=say)

    if not is_dry_run:
        make_once(out, (out / MANIFEST).exists, make)
    return str(out)


def _open_text(text: str) -> tuple[FileSource | DatasetSource, Any]:
    """Return the source of a text, and what its content is known by: its files' hashes, or the commit on the Hub."""
    path, name = Path(text), _name_of(text)
    if path.exists() or glob.has_magic(text):
        if (path / MANIFEST).exists():
            raise DataError(f"text={text} is a folder of shards, not of text: give it as --data.path {text}")
        # Absolute, since the plan names it; the current folder's name may have characters of a pattern in it.
        source = FileSource([path.absolute() if path.exists() else Path(glob.escape(str(Path.cwd())), text)])
        return source, _identify(source.files())
    if file_kind(text) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", text):
        raise DataError(
            f"text={text}: no such file or folder. Give a file or folder of .txt, .jsonl (also .gz, .xz, .zst) or "
            '.parquet, a pattern in quotes ("notes/**/*.txt"), or a data set on the Hub (OWNER/NAME)'
        )
    try:
        commit = find_commit(text, "main")
        return DatasetSource(text, commit=commit), commit
    except UserError as error:
        ready = [str(path.parent) for path in CACHE.glob(f"{name}-*/{MANIFEST}")]
        hint = f"; prepared earlier: --data.path {' or '.join(ready)}" if ready else ""
        raise DataError(f"text={text} is not a file or folder here. As a data set: {error}{hint}") from error


def _identify(files: list[Path]) -> list[tuple[str, str | tuple[int, int]]]:
    """Return each file's path below their common folder, and its SHA-256 (its size and time if they are large)."""
    is_large = sum(file.stat().st_size for file in files) > _HASHED_BYTES
    common, identity = os.path.commonpath(files), []
    for file in files:
        with name_unreadable_file(file), file.open("rb") as stream:
            stat = file.stat()
            digest = None if is_large else hashlib.file_digest(stream, "sha256").hexdigest()
        name = Path(os.path.relpath(file, common)).as_posix()
        identity.append((name, digest or (stat.st_size, stat.st_mtime_ns)))
    return identity


def _name_of(text: str) -> str:
    """Return a name for the folder: book for texts/book.jsonl.zst, OWNER-NAME for a data set."""
    path = Path(text)
    name = path.absolute().name.split(".")[0] if path.exists() else text
    return re.sub(r"[^\w-]+", "-", name).strip("-")[-40:] or "text"
