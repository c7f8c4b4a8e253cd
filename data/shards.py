"""
Shards: files of tokens in llm.c's format, and the manifest beside them.

    256 int32, little-endian    20240520 (magic), 1 (version), number of tokens, zeros
    tokens, uint16              each document led by token 50256

The pretokenised FineWeb sets for llm.c on the Hub are in this format and can be used as they are; they have no
manifest. A folder that data.prepare made has one, and then the manifest decides which files belong to it.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data import DataError
from data.tokenizer import VOCAB_SIZE, tokenizer_sha256

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
MANIFEST = "manifest.json"
FORMAT_VERSION = 1
REMEDY = "prepare the folder again with `python -m data.prepare sample|files ... --out DIR`, or copy the file again"


def write_shard(path, tokens):
    """
    Writes one shard under another name, then renames it.

    Args:
        path: the file.
        tokens: [N] token ids.

    Returns:
        the file's SHA-256, hex.

    Raises:
        DataError: an id outside the vocabulary.
    """
    path = Path(path)
    tokens = np.asarray(tokens)
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < VOCAB_SIZE:
        raise DataError(f"{path}: token ids {tokens.min()} to {tokens.max()} do not fit GPT-2's {VOCAB_SIZE} tokens")
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    return write_and_rename(path, header, np.ascontiguousarray(tokens, dtype="<u2"))


def write_and_rename(path, *parts):
    """
    Bytes, or arrays as they lie in memory, to a file that is there whole or not at all.

    Returns:
        the file's SHA-256, hex.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.partial")
    sha256 = hashlib.sha256()
    try:
        with aside.open("wb") as file:
            for part in parts:  # one after the other: joined, a shard of 200 MB would be in memory once more
                file.write(part)
                sha256.update(part)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    return sha256.hexdigest()


def open_shard(path):
    """
    Returns:
        [N] read-only uint16 array, memory-mapped.

    Raises:
        DataError: the file is missing, or its header and size are not those of a whole shard.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = np.frombuffer(file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), dtype="<i4")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; {REMEDY}") from error
    magic, version, count = (int(value) for value in header[:3])
    if size < HEADER_BYTES:
        raise DataError(f"{path}: {size} bytes are less than a shard's header of {HEADER_BYTES}; {REMEDY}")
    if magic != MAGIC:
        raise DataError(f"{path}: not a token shard (it begins with {magic}, a shard with {MAGIC}); {REMEDY}")
    if version != VERSION:
        raise DataError(f"{path}: shard version {version}, this program reads version {VERSION}; {REMEDY}")
    if count < 0 or size != HEADER_BYTES + 2 * count:
        raise DataError(
            f"{path}: the header promises {count:,} tokens, {HEADER_BYTES + 2 * count:,} bytes, and the file has "
            f"{size:,}: torn or still being written; {REMEDY}"
        )
    if count == 0:
        return np.zeros(0, dtype="<u2")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


def check_ids(tokens, shard, begin=0):
    """
    Args:
        tokens: [N] token ids, N > 0: the tokens of `shard` from `begin` on.
        shard: as `open_shard` gives it, for the message.

    Raises:
        DataError: an id that GPT-2 does not have; names the file and the token's place in it.
    """
    if tokens.max() >= VOCAB_SIZE:
        raise DataError(
            f"{getattr(shard, 'filename', 'shard')}: token {begin + int(tokens.argmax())} is {tokens.max()}, and GPT-2 "
            f"has only {VOCAB_SIZE}: made with another tokenizer, or damaged; {REMEDY}"
        )


@dataclass(kw_only=True)
class Manifest:
    """manifest.json: what a folder of shards holds and how it was made."""

    source: dict
    """where the documents came from"""
    split_rule: str
    """how documents were dealt to train and val"""
    shards: list = field(default_factory=list)
    """one {"file", "split", "tokens", "documents", "sha256"} a shard"""
    tokenizer: str = "gpt2"
    """its name, and below what decides whether it is the same"""
    tokenizer_sha256: str = field(default_factory=tokenizer_sha256)
    """see data.tokenizer.tokenizer_sha256"""
    val_fraction: float | None = None
    """the share of documents asked for as val; None where nobody asked"""
    versions: dict = field(default_factory=dict)
    """of what made it: {"python": "3.11.7", "tiktoken": ...}"""
    format_version: int = FORMAT_VERSION
    """of the manifest"""

    def write(self, folder):
        write_and_rename(Path(folder) / MANIFEST, (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode())

    def total(self, split, key):
        """Sum of "tokens" or "documents" over the shards of a split."""
        return sum(shard[key] for shard in self.shards if shard["split"] == split)


def read_manifest(folder):
    """
    Returns:
        Manifest, or None where there is none.

    Raises:
        DataError: it cannot be read, lacks something, or speaks of another tokenizer.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found_format, found_sha256 = content["format_version"], content["tokenizer_sha256"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{path} is not a manifest ({type(error).__name__}: {error}); {REMEDY}") from error
    if found_format != FORMAT_VERSION:  # first: another format may have other keys
        raise DataError(f"{path}: format {found_format}, this program reads {FORMAT_VERSION}; {REMEDY}")
    if found_sha256 != tokenizer_sha256():
        raise DataError(f"{path}: these shards were made with another tokenizer than GPT-2's; {REMEDY}")
    try:
        manifest = Manifest(**content)
        for shard in content["shards"]:  # not the default: a manifest without a list of shards is not one
            for key, kind in (("file", str), ("split", str), ("tokens", int), ("documents", int), ("sha256", str)):
                if not isinstance(shard[key], kind):
                    raise TypeError(f"{key} is {shard[key]!r}")
    except (TypeError, KeyError) as error:
        raise DataError(f"{path} is not a manifest ({type(error).__name__}: {error}); {REMEDY}") from error
    return manifest


def open_split(folder, split):
    """
    Args:
        split: "train" or "val".

    Returns:
        list of shards as `open_shard` gives them, in order.

    Raises:
        DataError: no such folder, no shards of that split, or one of them is not whole.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(
            f"no data in {folder}: there is no such folder. Make it with "
            f"`python -m data.prepare files YOUR_TEXT --out {folder}` (or `sample`, for the offline sample)"
        )
    manifest = read_manifest(folder)
    if manifest is None:
        # {name}_{split}_{number}.bin, from the right: a name may well have "_val_" in it too.
        paths = sorted(path for path in folder.glob("*.bin") if path.stem.split("_")[-2:-1] == [split])
        shards = [open_shard(path) for path in paths]
    else:
        shards = []
        for entry in manifest.shards:
            if entry["split"] == split:
                shard = open_shard(folder / entry["file"])
                if len(shard) != entry["tokens"]:
                    raise DataError(
                        f"{folder / entry['file']}: {len(shard):,} tokens, "
                        f"{MANIFEST} says {entry['tokens']:,}; {REMEDY}"
                    )
                shards.append(shard)
    if not shards:
        raise DataError(
            f"no {split} shards (*_{split}_*.bin) in {folder}; make them with "
            f"`python -m data.prepare files YOUR_TEXT --out DIR`"
        )
    return shards


def identity(folder):
    """
    What a folder of shards is, for provenance.json and the console.

    Returns:
        dict: train_tokens, val_tokens, shards (number of files), manifest_sha256 and source (both None for shards
        that came without a manifest).

    Raises:
        DataError: as `open_split`.
    """
    manifest = read_manifest(folder) if Path(folder).is_dir() else None
    train, val = open_split(folder, "train"), open_split(folder, "val")
    return {
        "train_tokens": sum(len(shard) for shard in train),
        "val_tokens": sum(len(shard) for shard in val),
        "shards": len(train) + len(val),
        "manifest_sha256": manifest and hashlib.sha256((Path(folder) / MANIFEST).read_bytes()).hexdigest(),
        "source": manifest and manifest.source,
    }
