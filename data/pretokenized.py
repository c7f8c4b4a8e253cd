"""Import shards made by other tools: llm.c's, build-nanogpt's .npy, nanoGPT's train.bin and val.bin.

They are checked and used unchanged: those of a folder where they are, those of a Hub data set after a download.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from data import DataError
from data.hub import ask_hub, find_commit
from data.manifest import (
    DOWNLOADS,
    MANIFEST,
    SPLITS,
    TOKENIZER,
    Manifest,
    check_finished,
    read_manifest,
    record_tokenizer,
    shard_tokenizer,
    split_of,
    unmanaged_shards,
)
from data.nanogpt import nanogpt_tokenizer
from data.shards import HEADER_BYTES, HEADERLESS_NAMES, check_space, scan_shard
from data.tokenizer import GPT2, Tokenizer, open_tokenizer

_NPY_HEADER_BYTES = 128
_NAMES = "{name}_train_{number}.bin and {name}_val_{number}.bin (or .npy), or train.bin and val.bin"


def import_shards(
    where: str | Path,
    out: str | Path,
    *,
    name: str = "imported",
    revision: str = "main",
    tokenizer: Tokenizer | None = None,
    max_tokens: int | None = None,
    log: Callable[[str], object] = lambda line: None,
) -> Manifest:
    """Check the shards of a folder or a Hub data set, and write a manifest for them.

    Files that were downloaded before are checked again; only those that are missing or damaged are downloaded.

    Args:
        where: a folder, or OWNER/NAME on the Hub.
        out: folder of the manifest, and of downloaded shards; for a local folder it may be the same one.
        tokenizer: the one that made them; None for the one that the folder brings, or GPT-2's.
        max_tokens: take as many training shards as are needed for this many tokens.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; choose another --out")
    if max_tokens is not None and max_tokens < 1:
        raise DataError(f"--max_tokens must be at least 1, got {max_tokens}")
    is_remote = not Path(where).is_dir() and str(where).count("/") == 1 and str(where)[0] not in "./~"  # OWNER/NAME
    if is_remote:
        source = {"kind": "pretokenized", "dataset": str(where), "asked_revision": revision}
    else:
        source = {"kind": "pretokenized", "folder": str(where)}
        tokenizer = tokenizer or _own_tokenizer(Path(where))
    tokenizer = tokenizer or GPT2
    before = read_manifest(out)
    theirs = None if is_remote or Path(where).resolve() == out.resolve() else read_manifest(where)
    if theirs is not None and any(Path(entry["file"]).is_absolute() for entry in theirs.shards):
        raise DataError(f"{where} has the shards of {theirs.source.get('folder')}: import that folder")
    if not is_remote and theirs is None:
        check_finished(Path(where))
    if before is not None and any(before.source.get(key) != value for key, value in source.items()):
        raise DataError(f"{out} has shards of another source ({before.source}); choose another --out")
    if is_remote:
        source["revision"] = find_commit(str(where), revision, before.source["revision"] if before else None)
        files = _hub_files(str(where), source["revision"])
    else:
        files = _local_files(Path(where))
    files = _select(files, max_tokens, where, tokenizer.vocabulary.dtype.itemsize)
    recorded = {entry["file"]: entry["sha256"] for entry in before.shards} if before else {}
    in_source = {entry["file"]: entry["sha256"] for entry in theirs.shards} if theirs else {}
    out.mkdir(parents=True, exist_ok=True)
    if is_remote:
        check_space(out, sum(file["bytes"] for file in files if not (out / PurePosixPath(file["path"]).name).exists()))
    shards = []
    for part, file in enumerate(files):
        path = _fetch(str(where), source["revision"], file, out, log) if is_remote else Path(where) / file["path"]
        scan = scan_shard(path, vocabulary=tokenizer.vocabulary)
        del scan["crc32_of_all"]
        if in_source.get(path.name, scan["sha256"]) != scan["sha256"]:
            raise DataError(f"{path} is not the file that {Path(where) / MANIFEST} describes; repair that folder first")
        shown = path.name if path.parent.resolve() == out.resolve() else str(path.resolve())
        if recorded.get(shown, scan["sha256"]) != scan["sha256"]:
            raise DataError(f"{path} is not the file that {out / MANIFEST} describes; copy it again from its source")
        shards.append({"file": shown, "split": split_of(file["path"]), "part": part, **scan})
    shutil.rmtree(out / DOWNLOADS, ignore_errors=True)
    manifest = Manifest(
        name=name,
        source=source,
        inputs=[{"path": file["path"], "bytes": file["bytes"], "part": part} for part, file in enumerate(files)],
        split_rule="by the names of the imported files",
        max_tokens=max_tokens,
        tokenizer=record_tokenizer(tokenizer, out),
        shards=shards,
    )
    manifest.write(out / MANIFEST)
    return manifest


def _own_tokenizer(folder: Path) -> Tokenizer | None:
    """Return the tokenizer that a folder of shards brings; None if it has none."""
    if (folder / MANIFEST).exists():
        return shard_tokenizer(folder)
    if (folder / TOKENIZER).is_dir():  # its manifest was lost
        return open_tokenizer(str(folder / TOKENIZER))
    return nanogpt_tokenizer(folder)


def _local_files(folder: Path) -> list[dict[str, Any]]:
    """List {"path", "bytes"} of the shards in a folder."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; the name of a data set on the Hub looks like owner/name")
    paths = [path for paths in unmanaged_shards(folder).values() for path in paths]
    return [{"path": path.name, "bytes": path.stat().st_size} for path in paths]


def _hub_files(dataset: str, commit: str) -> list[dict[str, Any]]:
    """List {"path", "bytes", "sha256" (None for a small file)} of the shards of a data set."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    def call() -> list[RepoFile]:
        tree = HfApi().list_repo_tree(dataset, recursive=True, revision=commit, repo_type="dataset")
        return [file for file in tree if isinstance(file, RepoFile) and split_of(file.path)]

    files = ask_hub(call, dataset, "the list of its files", commit)
    names = [PurePosixPath(file.path).name for file in files]
    if len(set(names)) < len(names):
        raise DataError(f"{dataset} has shards of the same name in several folders; download one folder and import it")
    return [{"path": f.path, "bytes": f.size, "sha256": f.lfs.sha256 if f.lfs else None} for f in files]


def _select(files: list[dict[str, Any]], max_tokens: int | None, where: object, itemsize: int) -> list[dict[str, Any]]:
    """Select all shards of val, and as many of train as are needed for max_tokens."""
    for split in SPLITS:
        if not any(split_of(file["path"]) == split for file in files):
            raise DataError(f"{where}: no {split} shards; they are recognized by their names, {_NAMES}")
    selected, tokens = [], 0
    for file in sorted(files, key=lambda file: (str(split_of(file["path"])), file["path"])):
        path = PurePosixPath(file["path"])
        if split_of(path) == "val":
            selected.append(file)
        elif max_tokens is None or tokens < max_tokens:
            header = _NPY_HEADER_BYTES if path.suffix == ".npy" else HEADER_BYTES
            tokens += (file["bytes"] - (0 if path.name in HEADERLESS_NAMES else header)) // itemsize
            selected.append(file)
    return selected


def _fetch(dataset: str, commit: str, file: dict[str, Any], out: Path, log: Callable[[str], object]) -> Path:
    """Return the path of a shard in `out`, downloaded unless it is there, with the Hub's size and SHA-256."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    target = out / PurePosixPath(file["path"]).name
    if target.exists() and _mismatch(target, file) is None:
        return target

    def call() -> Path:
        path = Path(
            hf_hub_download(dataset, file["path"], repo_type="dataset", revision=commit, local_dir=out / DOWNLOADS)
        )
        if problem := _mismatch(path, file):
            path.unlink()
            raise OSError(problem)
        return path

    log(f"download  {file['path']} ({file['bytes'] / 1e6:,.0f} MB)")
    disable_progress_bars()
    ask_hub(call, dataset, file["path"], commit).replace(target)
    return target


def _mismatch(path: Path, file: dict[str, Any]) -> str | None:
    """Compare a file with the Hub's size and SHA-256; None if both match."""
    size = path.stat().st_size
    if size != file["bytes"]:
        return f"received {size:,} of {file['bytes']:,} bytes"
    if file["sha256"] is not None:
        with path.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != file["sha256"]:
                return "the SHA-256 of the received file is not the Hub's"
    return None
