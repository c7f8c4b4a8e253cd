"""manifest.json describes a folder of shards: its files, their source and their checksums.

data.prepare writes it last, so a folder that has one is complete. Until then the folder has preparing.json, the same
without shards. A folder without either has shards made by another tool; the file names give the splits, and the
tokenizer is GPT-2's. The files of another tokenizer are in the folder's `tokenizer/`.
"""

import dataclasses
import difflib
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from common.cli import shell_quote
from common.errors import one_line
from common.files import write_text_atomically
from data import DataError
from data.corpora import CORPORA
from data.shards import HEADERLESS_NAMES, REMEDY, Shard, open_shard, reading
from data.tokenizer import GPT2, Tokenizer, Vocabulary

MANIFEST = "manifest.json"
PREPARING = "preparing.json"
DOWNLOADS = ".downloads"  # files that `data.prepare pretokenized` has not checked yet
TOKENIZER = "tokenizer"
NANOGPT_META = "meta.pkl"
FORMAT_VERSION = 3
SPLITS = ("train", "val")
_CHECKSUM_KEY = "sha256_of_the_rest"
_REMEDY = "restore it, or remove it and make a new one: `python -m data.prepare pretokenized DIR --out DIR`"


@dataclass(kw_only=True)
class TokenizerRecord:
    """The tokenizer of a folder of shards; by default GPT-2's."""

    name: str = "gpt2"
    """as the user gave it; sha256 decides if two are the same"""
    sha256: str = GPT2.sha256
    vocab_size: int = GPT2.vocabulary.size
    eos: str = GPT2.eos_text
    """the token that separates documents"""
    eos_id: int = GPT2.vocabulary.eos_id
    pad: str | None = None
    unk: str | None = None
    dtype: str = "uint16"
    """of the tokens in shards"""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the files in DIR/tokenizer; none for GPT-2's, which comes with the program"""

    @property
    def vocabulary(self) -> Vocabulary:
        """Size and eos token, as `Shard` needs them."""
        return Vocabulary(self.vocab_size, self.eos_id)


def record_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> TokenizerRecord:
    """Write the tokenizer's files into DIR/tokenizer of a folder of shards, and return its record for the manifest."""
    return TokenizerRecord(
        name=tokenizer.name,
        sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eos=tokenizer.eos_text,
        eos_id=tokenizer.vocabulary.eos_id,
        pad=tokenizer.pad_text,
        unk=tokenizer.unk_text,
        dtype=tokenizer.vocabulary.dtype.name,
        files=tokenizer.save(Path(folder) / TOKENIZER),
    )


@dataclass(kw_only=True)
class Manifest:
    """The content of manifest.json."""

    name: str
    """prefix of the shards' file names"""
    source: dict[str, Any]
    """settings and provenance of the source, enough to fetch the documents again"""
    inputs: list[Any] = field(default_factory=list)
    """the source's tasks, in groups of up to 8 MB; of imported shards, {"path", "bytes", "part"} of each file"""
    split_rule: str
    """how documents were split into train and val"""
    val_fraction: float | None = None
    """fraction of the documents for val; None for imported shards"""
    shard_tokens: int | None = None
    """maximum number of tokens in a shard; None for imported shards"""
    max_tokens: int | None = None
    """maximum number of tokens in all shards; the last document may be cut"""
    tokenizer: TokenizerRecord = field(default_factory=TokenizerRecord)
    versions: dict[str, str] = field(default_factory=dict)
    """versions of the software that made the shards: {"python": "3.11.7", "tiktoken": ...}"""
    format_version: int = FORMAT_VERSION
    val_from: int | None = None
    """validation is the text from this token on; None if documents were drawn for it"""
    parts: list[dict[str, Any]] = field(default_factory=list)
    """{"part", "first", "last" (tasks), "tokens", ...} of each part: the tasks that its shards were made from"""
    shards: list[dict[str, Any]] = field(default_factory=list)
    """{"file", "split", "part", "tokens", "documents", "sha256", "crc32"} of each, in order (see shards.scan_shard)"""

    def write(self, path: str | Path) -> None:
        """Write the manifest with its checksum."""
        write_json_with_checksum(path, dataclasses.asdict(self))

    def total(self, split: str, key: str) -> int:
        """Sum "tokens" or "documents" over the shards of a split."""
        return sum(shard[key] for shard in self.shards if shard["split"] == split)


def write_json_with_checksum(path: str | Path, content: dict[str, Any]) -> None:
    """Write a JSON object with a checksum of its content, so that `read_json_with_checksum` detects damage."""
    content = {**content, _CHECKSUM_KEY: _checksum(content)}
    write_text_atomically(path, json.dumps(content, indent=1) + "\n")


def read_json_with_checksum(path: str | Path, remedy: str = _REMEDY) -> dict[str, Any]:
    """Read a file of `write_json_with_checksum`. Raises DataError, with the remedy, if it is damaged."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        is_intact = content.pop(_CHECKSUM_KEY) == _checksum(content)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise DataError(f"{path} is damaged or not a manifest ({reason}); {remedy}") from error
    if not is_intact:
        raise DataError(f"{path} is damaged: its checksum does not match its content; {remedy}")
    return content


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: str | Path, name: str = MANIFEST) -> Manifest | None:
    """Read a folder's MANIFEST (or PREPARING); None if the folder does not have one."""
    path = Path(folder) / name
    if not path.exists():
        return None
    remedy = _REMEDY if name == MANIFEST else f"remove {folder} and prepare it again"
    content = read_json_with_checksum(path, remedy)
    version = content.get("format_version")
    if version == 2:  # before 2026-12, with GPT-2's tokenizer only
        content |= {"tokenizer": {"sha256": content.get("tokenizer_sha256")}, "format_version": FORMAT_VERSION}
    elif version != FORMAT_VERSION:
        raise DataError(f"{path}: format {version!r}, this program reads {FORMAT_VERSION} and 2; {remedy}")
    tokenizer = TokenizerRecord(**_known_fields(TokenizerRecord, content["tokenizer"]))
    if tokenizer.name == "gpt2" and tokenizer.sha256 != GPT2.sha256:
        raise DataError(f"{path}: another tokenizer than GPT-2's made these shards; prepare them again")
    return Manifest(**(_known_fields(Manifest, content) | {"tokenizer": tokenizer}))


def _known_fields(kind: Any, content: dict[str, Any]) -> dict[str, Any]:
    """Leave out the keys of another version."""
    return {field.name: content[field.name] for field in dataclasses.fields(kind) if field.name in content}


def shard_tokenizer(folder: str | Path) -> Tokenizer:
    """Return the tokenizer of a folder of shards: the manifest's, or GPT-2's for a folder without one."""
    manifest = read_manifest(folder)
    if manifest is None or manifest.tokenizer.name == "gpt2":
        return GPT2
    record = manifest.tokenizer
    contents = {}
    for name, sha256 in record.files.items():
        path = Path(folder) / TOKENIZER / name
        with reading(path):
            contents[name] = path.read_bytes()
        if hashlib.sha256(contents[name]).hexdigest() != sha256:
            raise DataError(f"{path}: the tokenizer's file does not match its checksum; {REMEDY}")
    definition = contents["tokenizer.json"].decode()
    return Tokenizer(
        name=record.name, eos_text=record.eos, pad_text=record.pad, unk_text=record.unk, definition=definition
    )


def check_finished(folder: Path) -> None:
    """Raise DataError if data.prepare works on a folder without a manifest, or was interrupted."""
    if (folder / PREPARING).exists() or (folder / DOWNLOADS).exists():
        raise DataError(f"{folder} is not finished: run the same `python -m data.prepare` command again to resume it")


def needs_preparing(folder: str | Path) -> bool:
    """Return True if the folder does not exist, or has only what an interrupted preparation left."""
    folder = Path(folder)
    return not folder.exists() or ((folder / PREPARING).exists() and not (folder / MANIFEST).exists())


def open_split(folder: str | Path, split: str) -> list[Shard]:
    """Open the shards of a split ("train" or "val") of a folder, with or without a manifest, in order."""
    folder = Path(folder)
    if folder.is_file():
        raise DataError(
            f"{folder} is a file, not a folder of shards; for a text, `train.py --text {shell_quote(folder)}`"
        )
    if not folder.is_dir():
        source = folder.name if folder.name in CORPORA else "files YOUR_TEXT"
        raise DataError(
            f"no data in {folder}: the folder does not exist{_similar_names(folder)} Make it with "
            f"`python -m data.prepare {source} --out {shell_quote(folder)}` (or `sample`, for the offline sample)"
        )
    manifest = read_manifest(folder)
    if manifest is not None:
        shards = []
        for entry in (entry for entry in manifest.shards if entry["split"] == split):
            path = folder / entry["file"]  # imported shards have absolute paths
            shard = open_shard(path, crc32=entry["crc32"], vocabulary=manifest.tokenizer.vocabulary)
            if len(shard) != entry["tokens"]:
                raise DataError(f"{path}: {len(shard):,} tokens, {MANIFEST} says {entry['tokens']:,}; {REMEDY}")
            shards.append(shard)
    else:
        check_finished(folder)
        if (folder / NANOGPT_META).exists():
            raise DataError(
                f"{folder} has a tokenizer of its own ({NANOGPT_META}): import it with `python -m data.prepare "
                f"pretokenized {shell_quote(folder)} --out DIR`"
            )
        shards = [open_shard(path) for path in unmanaged_shards(folder).get(split, [])]
    if not shards:
        raise DataError(f"no {split} shards (*_{split}_*.bin) in {folder}; make them with `python -m data.prepare`")
    return shards


def _similar_names(folder: Path) -> str:
    """Name the folders next to it that have similar names, for a message."""
    try:
        names = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    except OSError:
        names = []
    similar = difflib.get_close_matches(folder.name, names, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(str(folder.parent / name) for name in similar)}?" if similar else "."


def unmanaged_shards(folder: str | Path) -> dict[str, list[Path]]:
    """Find the {split: shards in order} of a folder, with names that `split_of` knows."""
    shards: dict[str, list[Path]] = {}
    for path in sorted(Path(folder).iterdir()):
        split = split_of(path)
        if split and not path.name.startswith("."):
            shards.setdefault(split, []).append(path)
    return shards


def split_of(path: str | PurePath) -> str | None:
    """Return "train" or "val", or None if the file's name is not that of a shard."""
    path = PurePath(path)
    if path.name in HEADERLESS_NAMES:
        return path.stem
    split = (path.stem.split("_")[-2:-1] or [""])[0]  # from the right: the name may have "_val_" in it too
    return split if path.suffix in (".bin", ".npy") and split in SPLITS else None


def dataset_fingerprint(folder: str | Path) -> dict[str, Any]:
    """Describe a folder of shards, for provenance.json and the console; see `open_split` for errors.

    Returns:
        train_tokens, val_tokens and shards (number of files); manifest_sha256, train_sha256 (a hash over the training
        shards' hashes, in order) and source, which are None without a manifest; tokenizer (name), tokenizer_sha256
        and vocab_size.
    """
    train, val = open_split(folder, "train"), open_split(folder, "val")
    manifest = read_manifest(folder)
    tokenizer = TokenizerRecord() if manifest is None else manifest.tokenizer
    hashes = [entry["sha256"] for entry in manifest.shards if entry["split"] == "train"] if manifest else []
    return {
        "train_tokens": sum(len(shard) for shard in train),
        "val_tokens": sum(len(shard) for shard in val),
        "shards": len(train) + len(val),
        "manifest_sha256": manifest and hashlib.sha256((Path(folder) / MANIFEST).read_bytes()).hexdigest(),
        "train_sha256": manifest and hashlib.sha256("".join(hashes).encode()).hexdigest(),
        "source": manifest and manifest.source,
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
    }
