"""The plan of a preparation, and the records of its finished parts.

DIR/preparing.json is the plan, a Manifest without shards. DIR/parts/00003.json records the shards of part 3. When all
parts are recorded, `finish` writes DIR/manifest.json and removes the rest.
"""

import contextlib
import glob
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from common.files import atomic_write
from common.locks import Lock, Timeout
from data import DataError
from data.hub import HubSource
from data.manifest import (
    MANIFEST,
    PREPARING,
    SPLITS,
    Manifest,
    read_json_with_checksum,
    read_manifest,
    record_tokenizer,
    write_json_with_checksum,
)
from data.pretokenized import HubShards, LocalShards
from data.shards import open_shard, scan_shard, write_shard
from data.sources import FileSource, SampleSource
from data.tokenizer import Tokenizer

TextSource = SampleSource | FileSource | HubSource
ShardSource = LocalShards | HubShards
Source = TextSource | ShardSource

DOWNLOADS = "downloads"
CUT_RULE = "val is the end of the text, the last"
_MIN_CUT_FRACTION = 0.1
_PARTS, _LOCK = "parts", ".lock"
PART_BYTES = 2**28  # maximum size of a part of several files


def open_plan(plan: Manifest, source: Source, tokenizer: Tokenizer, out: Path) -> Manifest:
    """Write the plan into a new folder; return the plan of a started folder, or the manifest of a finished one."""
    if out.is_symlink() and not out.exists():
        raise DataError(f"{out} is a broken link; remove it or choose another --out")
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        old = read_manifest(out) or read_manifest(out, PREPARING)
        if old is not None:
            what = f"{out} {'already exists' if old.shards else 'was started'} with"
            _check_same_settings(old, plan, what)
            if old.tokenizer.sha256 != tokenizer.sha256:
                raise DataError(
                    f"{what} tokenizer {old.tokenizer.name!r}, got another one, {tokenizer.name!r}; use the same one, "
                    "choose another --out, or remove it"
                )
            if not old.shards:
                _reuse_inputs(old, source, out)
            return old
        is_source = isinstance(source, LocalShards) and source.folder.resolve() == out.resolve()
        if not is_source and any(not entry.name.startswith(".") for entry in out.iterdir()):
            raise DataError(f"{out} already exists and has other content; remove it or choose another --out")
        plan.inputs = _assign_parts(source)
        plan.source = {**plan.source, **source.provenance}
        plan.tokenizer = record_tokenizer(tokenizer, out)
        plan.write(out / PREPARING)
    return plan


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the folder's lock, and remove its file at the end unless the folder is still in preparation."""
    path = out / _LOCK
    with Lock(path, warn=_warn):
        try:
            yield
        finally:
            if not (out / PREPARING).exists():
                with contextlib.suppress(PermissionError):  # Windows cannot remove open files; filelock does it there
                    path.unlink(missing_ok=True)


@contextlib.contextmanager
def part_lock(out: Path, part: int) -> Iterator[None]:
    """Hold the lock of a part. Raises DataError if another process has it."""
    (out / _PARTS).mkdir(exist_ok=True)
    lock = Lock(out / _PARTS / f"{part:05d}.lock", warn=_warn)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise DataError(
            f"another process is preparing part {part} of {out}; wait for it, or stop it and run this command again"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _warn(line: str) -> None:
    print(line, file=sys.stderr)


def _check_same_settings(old: Manifest, new: Manifest, what: str) -> None:
    def settings(plan: Manifest) -> dict[str, Any]:
        names = ("val_fraction", "shard_tokens", "max_tokens")
        return {name: getattr(plan, name) for name in names} | plan.source

    old_settings = settings(old)
    for key, value in settings(new).items():
        if old_settings.get(key) != value:
            raise DataError(
                f"{what} {key} {old_settings.get(key)!r}, got {value!r}; use the same value, choose another --out, "
                "or remove it"
            )


def _assign_parts(source: Source) -> list[dict[str, Any]]:
    """Return the source's files, each with its part."""
    files: list[dict[str, Any]] = []
    part = size = 0
    limit = 0 if isinstance(source, ShardSource) else PART_BYTES
    for file in source.inputs():
        if files and size + file["bytes"] > limit:
            part, size = part + 1, 0
        files.append({**file, "part": part})
        size += file["bytes"]
    return files


def _reuse_inputs(plan: Manifest, source: Source, out: Path) -> None:
    """Use the commit of the plan. Accept changed local files if their part is not finished: the user fixed them."""
    if isinstance(source, HubSource | HubShards):
        source.repository.pin(plan.source["revision"])
        return
    files, finished = source.inputs(), part_records(out)
    if [file["path"] for file in files] != [file["path"] for file in plan.inputs]:
        raise DataError(f"{out} was started with other files; choose another --out, or remove it")
    for file, old in zip(files, plan.inputs, strict=True):
        if file["bytes"] != old["bytes"] and old["part"] in finished:
            raise DataError(f"{file['path']} has changed since its part of {out} was made; remove {out}")
    inputs = [{**file, "part": old["part"]} for file, old in zip(files, plan.inputs, strict=True)]
    if inputs != plan.inputs:
        plan.inputs = inputs
        plan.write(out / PREPARING)


def part_records(out: Path) -> dict[int, dict[str, Any]]:
    """Return {part: record} of the finished parts; a record is {"part", "shards", "is_full"}."""
    remedy = "remove it, and its part is made again"
    records = [read_json_with_checksum(path, remedy) for path in sorted((out / _PARTS).glob("*.json"))]
    return {record["part"]: record for record in records}


def write_part_record(out: Path, record: dict[str, Any]) -> None:
    """Record a finished part."""
    (out / _PARTS).mkdir(exist_ok=True)
    write_json_with_checksum(out / _PARTS / f"{record['part']:05d}.json", record)


def is_complete(plan: Manifest, records: Mapping[int, dict[str, Any]]) -> bool:
    """Return True if all parts are finished. A part that reaches max_tokens is the last one."""
    full = [part for part, record in records.items() if record["is_full"]]
    last = min(full) if full else plan.num_parts - 1
    return all(part in records for part in range(last + 1))


def has_finished_work(out: Path) -> bool:
    """Return True if the folder has a manifest, a finished part or downloads."""
    return any((out / _PARTS).glob("*.json")) or any((out / name).exists() for name in (MANIFEST, DOWNLOADS))


def kept_parts(out: str | Path) -> str:
    """Return the end of an error message: the finished parts that the next run keeps."""
    out = Path(out)
    with contextlib.suppress(DataError, OSError):
        plan, records = read_manifest(out, PREPARING), part_records(out)
        if plan is not None and records:
            return f". {len(records)} of {plan.num_parts} parts are kept in {out}: run the same command to resume"
    return ""


def finish(out: Path) -> Manifest | None:
    """Write the manifest and remove the records if all parts are finished; return None if parts are missing."""
    with _locked(out):
        manifest = read_manifest(out)
        if manifest is None:
            manifest, records = _read_plan(out), part_records(out)
            if not is_complete(manifest, records):
                return None
            manifest.shards = [shard for part in sorted(records) for shard in records[part]["shards"]]
            if manifest.val_fraction is not None and not manifest.total("val", "tokens"):
                _cut_validation_split(manifest, out)
            for split in SPLITS:
                if not manifest.total(split, "tokens"):
                    _remove_everything(manifest, out)
                    raise DataError(
                        f"the {split} split has no documents (val_fraction {manifest.val_fraction}): give more "
                        "text, or another --val_fraction"
                    )
            manifest.write(out / MANIFEST)
        if manifest.split_rule.startswith(CUT_RULE):
            listed = {shard["file"] for shard in manifest.shards}
            for path in out.glob(f"{glob.escape(manifest.name)}_train_*.bin"):
                if path.name not in listed:
                    path.unlink()
        (out / PREPARING).unlink(missing_ok=True)
        shutil.rmtree(out / _PARTS, ignore_errors=True)
        downloads = out / DOWNLOADS
        shutil.rmtree(downloads / ".cache", ignore_errors=True)  # written by huggingface_hub
        if not any(path.is_file() for path in downloads.rglob("*")):
            shutil.rmtree(downloads, ignore_errors=True)
    return manifest


def _cut_validation_split(manifest: Manifest, out: Path) -> None:
    """Move the last tokens from the training shards to a validation shard.

    A tenth of the tokens as in nanoGPT's Shakespeare, or val_fraction if that is more. The shards get new names, so
    that the old ones are there until the manifest is written.
    """
    total = manifest.total("train", "tokens")
    wanted = math.ceil(max(manifest.val_fraction or 0, _MIN_CUT_FRACTION) * total)
    vocabulary = manifest.tokenizer.vocabulary
    tail: list[np.ndarray] = []
    left = wanted
    while left and manifest.shards:
        entry = manifest.shards.pop()
        tokens = open_shard(out / entry["file"], entry["crc32"], vocabulary=vocabulary)[:]
        tail.insert(0, tokens[len(tokens) - min(left, len(tokens)) :])
        left -= len(tail[0])
        if len(tail[0]) < len(tokens):
            manifest.shards.append(_write_cut(manifest, out, "train", entry["part"], tokens[: -len(tail[0])]))
    if not tail:
        return
    manifest.shards.append(_write_cut(manifest, out, "val", manifest.num_parts, np.concatenate(tail)))
    manifest.split_rule = f"{CUT_RULE} {wanted:,} of {total:,} tokens"


def _write_cut(manifest: Manifest, out: Path, split: str, part: int, tokens: np.ndarray) -> dict[str, Any]:
    path = out / f"{manifest.name}_{split}_{part:05d}999.bin"
    write_shard(path, tokens, manifest.tokenizer.vocabulary)
    scan = scan_shard(path, vocabulary=manifest.tokenizer.vocabulary)
    del scan["crc32_of_all"]
    return {"file": path.name, "split": split, "part": part, **scan}


def _read_plan(folder: Path) -> Manifest:
    plan = read_manifest(folder, PREPARING)
    if plan is None:
        raise DataError(f"{folder} has no parts of a preparation (no {PREPARING} in it)")
    return plan


def _remove_everything(manifest: Manifest, out: Path) -> None:
    if manifest.source["kind"] != "pretokenized":
        for shard in manifest.shards:
            (out / shard["file"]).unlink(missing_ok=True)
    shutil.rmtree(out / _PARTS)
    (out / PREPARING).unlink()


def merge(folders: Sequence[str | Path], out: str | Path) -> Manifest:
    """Merge the folders in which several machines prepared their parts of the same source; `out` may be one of them.

    Raises:
        DataError: a folder has no parts, the parts are of different preparations, or a part is missing.
    """
    out = Path(out)
    if (out / MANIFEST).exists():
        raise DataError(f"{out} is already prepared; choose another --out")
    plans = [_read_plan(Path(folder)) for folder in folders]
    for folder, plan in zip(folders, plans, strict=True):
        if asdict(plan) | {"versions": None} != asdict(plans[0]) | {"versions": None}:
            raise DataError(f"{folder} and {folders[0]} are not parts of the same preparation")
    out.mkdir(parents=True, exist_ok=True)
    if not (out / PREPARING).exists():
        plans[0].write(out / PREPARING)
    for folder in map(Path, folders):
        if folder.resolve() != out.resolve():
            for record in part_records(folder).values():
                for shard in record["shards"]:
                    _copy_shard(folder, shard, out)
                write_part_record(out, record)
    manifest = finish(out)
    if manifest is None:
        missing = sorted(set(range(plans[0].num_parts)) - part_records(out).keys())
        raise DataError(
            f"of {plans[0].num_parts} parts, {len(missing)} are missing: {', '.join(map(str, missing[:20]))}"
            f"{' ...' if len(missing) > 20 else ''}; prepare them (--shard_index, --shard_count) and merge again"
        )
    return manifest


def _copy_shard(folder: Path, shard: dict[str, Any], out: Path) -> None:
    if Path(shard["file"]).is_absolute():
        return
    with atomic_write(out / shard["file"]) as tmp_path:
        try:
            shutil.copyfile(folder / shard["file"], tmp_path)
        except FileNotFoundError as error:
            raise DataError(f"{folder / shard['file']} is missing; copy it there, or prepare its part again") from error
        if scan_shard(tmp_path)["sha256"] != shard["sha256"]:
            raise DataError(f"{folder / shard['file']} is damaged; copy it again, or prepare its part again")
