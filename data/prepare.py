"""
Make shards from text.

    python -m data.prepare sample --out shards/sample
    python -m data.prepare fineweb-edu --out shards/fineweb-edu
    python -m data.prepare hub --dataset OWNER/NAME --subset S --text_column C --out shards/theirs
    python -m data.prepare files book.txt notes/ "logs/**/*.jsonl.zst" --out shards/mine
    python -m data.prepare pretokenized kjj0/finewebedu10B-gpt2 --out shards/fineweb-edu

The input files are grouped into parts; a large file gets its own part. Each part is fetched, tokenized, written, read
again and recorded in DIR/parts. When all parts are recorded, DIR/manifest.json is written and the records are removed.
The shards of a part depend only on the part. So an interrupted preparation resumes at the first missing part, and
several machines can divide the parts (--shard_index, --shard_count); the bytes of the shards are the same.
"""

import argparse
import contextlib
import errno
import glob
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from common.cli import Parser, interrupt_exit_code, prepare_process, print_interrupted, run_command, shell_quote

if __name__ == "__main__":
    prepare_process()

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from common.files import atomic_write
from common.locks import Lock, Timeout
from data import DataError
from data.encode import SPLIT_RULE, Encoder
from data.hub import HubRepository, HubSource, in_background
from data.manifest import (
    MANIFEST,
    PREPARING,
    SPLITS,
    Manifest,
    read_json_with_checksum,
    read_manifest,
    write_json_with_checksum,
)
from data.pretokenized import HubShards, LocalShards
from data.shards import MAX_TOKENS, ShardWriter, scan_shard
from data.sources import FileSource, Progress, Record, SampleSource
from data.tokenizer import TOKENIZER_BACKENDS

Source = SampleSource | FileSource | HubSource | HubShards | LocalShards
_SHARD_TOKENS = 100_000_000  # llm.c's, 200 MB
_PART_BYTES = 2**28  # maximum size of a part of several files
_SAMPLE_VAL_FRACTION = 0.05
_PARTS, _DOWNLOADS, _LOCK = "parts", "downloads", ".lock"
_SECONDS_BETWEEN_LINES = 30

# Bytes of shards per byte of input: a token has two bytes and is about 4.3 bytes of English text.
_SHARDS_PER_BYTE = {".txt": 0.5, ".jsonl": 0.5, ".parquet": 0.75, ".gz": 1.4, ".zst": 1.7, ".xz": 1.9}


def prepare(
    source: Source,
    out: str | Path,
    *,
    name: str,
    val_fraction: float | None = None,
    shard_tokens: int = _SHARD_TOKENS,
    max_tokens: int | None = None,
    num_proc: int = 1,
    tokenizer_backend: str = "tiktoken",
    shard_index: int = 0,
    shard_count: int = 1,
    log: Callable[[str], object] = lambda line: None,
) -> Manifest | None:
    """
    Make a folder of shards with a manifest, or resume making it.

    A document is never split over two shards. The bytes of the shards depend on the source, `val_fraction`,
    `shard_tokens` and `max_tokens`, but not on `num_proc`, `tokenizer_backend`, `shard_count` or interruptions.

    Args:
        source: documents, see data.sources, or shards to import, see data.pretokenized.
        out: the folder to make.
        name: prefix of the file names: {name}_train_00000000.bin has 5 digits for the part, 3 for the shard in it.
        val_fraction: fraction of the documents for validation; None for imported shards.
        shard_tokens: maximum number of tokens in a shard (a longer document gets its own shard).
        max_tokens: maximum number of tokens in all shards; the last document is the last one that fits.
        num_proc: number of tokenizer processes.
        tokenizer_backend: see data.tokenizer.load_encoder.
        shard_index: index of the first part to prepare.
        shard_count: prepare every shard_count-th part from there.
        log: called with lines for the user.

    Returns:
        The manifest; None if other machines have not prepared their parts yet.

    Raises:
        DataError: the folder has other content, the source failed, a split has no documents, the disk is full, or a
            process was killed. Finished parts are kept.
    """
    out = Path(out)
    _check_numbers(val_fraction, num_proc, shard_tokens, max_tokens, shard_index, shard_count)
    is_new = not out.exists()
    try:
        plan = _open_plan(source, out, name, val_fraction, shard_tokens, max_tokens, tokenizer_backend)
        if plan.shards:
            log(f"{out} is already prepared: nothing to do")
            return finish(out)  # completes an interrupted cleanup
        own_parts = [part for part in range(plan.num_parts) if part % shard_count == shard_index]
        _check_disk(plan, source, out, own_parts, log)
        _prepare_parts(plan, source, out, own_parts, num_proc=num_proc, tokenizer_backend=tokenizer_backend, log=log)
        return finish(out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = error.filename or out
            raise DataError(f"no space for {where} on its disk; free some or choose another --out") from error
        raise DataError(f"{out} was not made: {error}; fix that or choose another --out") from error
    finally:
        if is_new and shard_count == 1 and out.is_dir() and not _has_finished_work(out):
            shutil.rmtree(out)


def prepare_sample(out: str | Path, *, val_fraction: float = _SAMPLE_VAL_FRACTION, **options: Any) -> Manifest | None:
    """Prepare the offline sample corpus, as train.py does for `--data.prepare_sample`; see `prepare`."""
    return prepare(SampleSource(), out, name="sample", val_fraction=val_fraction, **options)


def _check_numbers(
    val_fraction: float | None,
    num_proc: int,
    shard_tokens: int,
    max_tokens: int | None,
    shard_index: int,
    shard_count: int,
) -> None:
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise DataError(f"--val_fraction must be between 0 and 1, got {val_fraction}")
    if num_proc < 1:
        raise DataError(f"--num_proc must be at least 1, got {num_proc}")
    if not 1 <= shard_tokens <= MAX_TOKENS:
        raise DataError(f"--shard_tokens must be between 1 and {MAX_TOKENS:,}, got {shard_tokens}")
    if max_tokens is not None and max_tokens < 1:
        raise DataError(f"--max_tokens must be at least 1, got {max_tokens}")
    if not 0 <= shard_index < shard_count:
        raise DataError(f"--shard_index must be between 0 and --shard_count - 1, got {shard_index} of {shard_count}")
    if max_tokens is not None and shard_count > 1:
        raise DataError("--max_tokens needs all parts in order, and --shard_count divides them: give only one of them")


# ----------------------------------------------------------------------------------------------------------
# The plan of a preparation and its finished parts.


def _open_plan(
    source: Source,
    out: Path,
    name: str,
    val_fraction: float | None,
    shard_tokens: int,
    max_tokens: int | None,
    tokenizer_backend: str,
) -> Manifest:
    """Return the folder's plan, a Manifest without shards, or the manifest of a finished folder."""
    if out.is_symlink() and not out.exists():
        raise DataError(f"{out} is a broken link; remove it or choose another --out")
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; choose another --out")
    settings = {
        "source": source.settings,
        "val_fraction": val_fraction,
        "shard_tokens": None if val_fraction is None else shard_tokens,
        "max_tokens": max_tokens,
    }
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        plan = read_manifest(out) or read_manifest(out, PREPARING)
        if plan is not None:
            state = "already exists" if plan.shards else "was started"
            _check_same_settings(plan, settings, f"{out} {state} with")
            if plan.shards:
                return plan
            if hasattr(source, "repository"):
                source.repository.pin(plan.source["revision"])
            else:
                _accept_changed_inputs(plan, source, out)
            return plan
        if any(not entry.name.startswith(".") for entry in out.iterdir()) and not _is_source_folder(source, out):
            raise DataError(f"{out} already exists and has other content; remove it or choose another --out")
        plan = Manifest(
            name=name,
            inputs=_assign_parts(source),
            source={**source.settings, **source.provenance},
            split_rule=SPLIT_RULE if val_fraction is not None else "by the names of the imported files",
            versions=_versions(tokenizer_backend),
            **{key: value for key, value in settings.items() if key != "source"},
        )
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


def _check_same_settings(plan: Manifest, settings: Mapping[str, Any], what: str) -> None:
    """Raise if the settings of the folder's plan are not the current ones."""
    old = {"val_fraction": plan.val_fraction, "shard_tokens": plan.shard_tokens, "max_tokens": plan.max_tokens}
    old |= {key: plan.source.get(key) for key in plan.source.keys() & settings["source"].keys() | {"kind"}}
    new = {**{key: value for key, value in settings.items() if key != "source"}, **settings["source"]}
    for key, value in new.items():
        if old.get(key) != value:
            raise DataError(
                f"{what} {key} {old.get(key)!r}, got {value!r}; use the same value, choose another --out, or remove it"
            )


def _assign_parts(source: Source) -> list[dict[str, Any]]:
    """Return the source's files, each with its part."""
    files, part, size = [], 0, 0
    limit = 0 if hasattr(source, "import_shard") else _PART_BYTES
    for file in source.inputs():
        if files and size + file["bytes"] > limit:
            part, size = part + 1, 0
        files.append({**file, "part": part})
        size += file["bytes"]
    return files


def _accept_changed_inputs(plan: Manifest, source: Source, out: Path) -> None:
    """Accept changed input files if their part is not finished (the user probably fixed them)."""
    files, part_records = source.inputs(), _part_records(out)
    if [file["path"] for file in files] != [file["path"] for file in plan.inputs]:
        raise DataError(f"{out} was started with other files; choose another --out, or remove it")
    for file, old in zip(files, plan.inputs, strict=True):
        if file["bytes"] != old["bytes"] and old["part"] in part_records:
            raise DataError(f"{file['path']} has changed since its part of {out} was made; remove {out}")
    inputs = [{**file, "part": old["part"]} for file, old in zip(files, plan.inputs, strict=True)]
    if inputs != plan.inputs:
        plan.inputs = inputs
        plan.write(out / PREPARING)


def _is_source_folder(source: Source, out: Path) -> bool:
    return isinstance(source, LocalShards) and source.folder.resolve() == out.resolve()


def _versions(tokenizer_backend: str) -> dict[str, str]:
    """Return the versions of the software that makes the tokens, for the manifest."""
    versions = {"python": platform.python_version(), "tiktoken": metadata.version("tiktoken")}
    for package in ("gpt2-repro", *([tokenizer_backend] if tokenizer_backend != "tiktoken" else [])):
        with contextlib.suppress(metadata.PackageNotFoundError):  # a checkout need not be installed
            versions[package] = metadata.version(package)
    return versions


def _part_records(out: Path) -> dict[int, dict[str, Any]]:
    """Return {part: record} of the finished parts; a record is {"part", "shards", "is_full"}."""
    remedy = "remove it, and its part is made again"
    records = [read_json_with_checksum(path, remedy) for path in sorted((out / _PARTS).glob("*.json"))]
    return {record["part"]: record for record in records}


def _is_complete(plan: Manifest, part_records: Mapping[int, dict[str, Any]]) -> bool:
    """Return True if all parts are finished. A part that reaches max_tokens is the last one."""
    full = [part for part, part_record in part_records.items() if part_record["is_full"]]
    last = min(full) if full else plan.num_parts - 1
    return all(part in part_records for part in range(last + 1))


def _has_finished_work(out: Path) -> bool:
    return any(True for _ in (out / _PARTS).glob("*.json")) or any(
        (out / name).exists() for name in (MANIFEST, _DOWNLOADS)
    )


def kept_parts(out: str | Path) -> str:
    """Return the end of an error message: the finished parts that the next run keeps."""
    out = Path(out)
    with contextlib.suppress(DataError, OSError):
        plan, part_records = read_manifest(out, PREPARING), _part_records(out)
        if plan is not None and part_records:
            return f". {len(part_records)} of {plan.num_parts} parts are kept in {out}: run the same command to resume"
    return ""


def _check_disk(
    plan: Manifest, source: Source, out: Path, own_parts: Sequence[int], log: Callable[[str], object]
) -> None:
    part_records = _part_records(out)
    files = [file for file in plan.inputs if file["part"] in own_parts and file["part"] not in part_records]
    if isinstance(source, LocalShards) or not files:
        return
    sizes = sorted((file["bytes"] for file in files), reverse=True)
    if isinstance(source, HubShards):
        needed = sum(sizes)
    else:
        needed = sum(file["bytes"] * _SHARDS_PER_BYTE.get(Path(file["path"]).suffix, 0.5) for file in files)
        if plan.max_tokens is not None:
            needed = min(needed, 2 * plan.max_tokens)
    if isinstance(source, HubSource):
        needed += sum(sizes) if source.keep else sum(sizes[:2])  # one is read while the next is downloaded
    free = shutil.disk_usage(out).free
    log(f"disk      about {needed / 1e9:,.2f} GB needed in {out} (an estimate), {free / 1e9:,.1f} GB free")
    if needed > free:
        raise DataError(
            f"{out} needs about {needed / 1e9:,.2f} GB (an estimate), but its disk has only {free / 1e9:,.2f} GB free; "
            "free some space, choose another --out, or give --max_tokens"
        )


# ----------------------------------------------------------------------------------------------------------
# Making the parts.


def _prepare_parts(
    plan: Manifest,
    source: Source,
    out: Path,
    own_parts: Sequence[int],
    *,
    num_proc: int,
    tokenizer_backend: str,
    log: Callable[[str], object],
) -> None:
    part_records = _part_records(out)
    if _is_complete(plan, part_records):
        return
    pending = [part for part in own_parts if part not in part_records]
    (out / _PARTS).mkdir(exist_ok=True)
    progress = Progress(sum(file["bytes"] for file in plan.inputs if file["part"] in own_parts))
    progress.bytes_done = sum(
        file["bytes"] for file in plan.inputs if file["part"] in own_parts and file["part"] in part_records
    )
    if progress.bytes_done:
        log(f"resume    {len(own_parts) - len(pending)} of {len(own_parts)} parts are done")
    earlier_shards = [shard for part_record in part_records.values() for shard in part_record["shards"]]
    with (
        _Display(progress, plan.max_tokens, log) as display,
        _PartMaker(
            plan, source, out, pending, display, earlier_shards, num_proc=num_proc, tokenizer_backend=tokenizer_backend
        ) as part_maker,
    ):
        for part in pending:
            with _part_lock(out, part):
                part_record = part_maker.make(part)
                write_json_with_checksum(out / _PARTS / f"{part:05d}.json", part_record)
                part_maker.release_inputs()
            if part_record["is_full"]:
                return


def make_part(manifest: Manifest, source: Source, part: int, out: str | Path, *, num_proc: int) -> list[dict[str, Any]]:
    """
    Make one part of a finished folder again.

    Args:
        manifest: the folder's manifest.
        source: the folder's source, from `source_of`.
        part: number of the part.
        out: folder for the part's shards.
        num_proc: number of tokenizer processes.

    Returns:
        The part's shards, as in a manifest.
    """
    out = Path(out)
    progress = Progress(sum(file["bytes"] for file in manifest.inputs if file["part"] == part))
    earlier_shards = [shard for shard in manifest.shards if shard["part"] < part]
    with (
        _Display(progress, None, lambda line: None) as display,
        _PartMaker(
            manifest, source, out, [part], display, earlier_shards, num_proc=num_proc, tokenizer_backend="tiktoken"
        ) as part_maker,
    ):
        return part_maker.make(part)["shards"]


@contextlib.contextmanager
def _part_lock(out: Path, part: int) -> Iterator[None]:
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


class _PartMaker:
    """Make parts in order, with one pool of processes, and download the next file while one is read."""

    def __init__(
        self,
        plan: Manifest,
        source: Source,
        out: Path,
        parts: Sequence[int],
        display: "_Display",
        earlier_shards: Sequence[dict[str, Any]],
        *,
        num_proc: int,
        tokenizer_backend: str,
    ) -> None:
        """
        Set up the encoder.

        Args:
            plan: the folder's plan.
            source: see `prepare`.
            out: the folder.
            parts: numbers of the parts to make.
            display: shows the progress.
            earlier_shards: entries of the shards before these parts, which count toward max_tokens.
            num_proc: see `prepare`.
            tokenizer_backend: see `prepare`.
        """
        self.plan, self.source, self.out, self.display = plan, source, out, display
        self.files = [file for file in plan.inputs if file["part"] in parts]
        self.copies, self.used = self._copies(), []
        self.tokens_left: int | None = None  # until max_tokens
        self.encoder: Encoder | None = None
        if not hasattr(source, "import_shard"):
            self.encoder = Encoder(
                num_proc=num_proc,
                val_fraction=plan.val_fraction,
                text_column=plan.source.get("text_column", "text"),
                errors=plan.source.get("errors", "strict"),
                tokenizer_backend=tokenizer_backend,
            )
            if plan.max_tokens is not None:
                self.tokens_left = plan.max_tokens - sum(shard["tokens"] for shard in earlier_shards)
        self.finisher = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        if self.encoder is not None:
            self.encoder.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.encoder is not None:
            self.encoder.__exit__(*error)
        self.finisher.shutdown()

    def make(self, part: int) -> dict[str, Any]:
        """Make a part and return its record: {"part", "shards", "is_full"}."""
        return self._import_shard(part) if self.encoder is None else self._tokenize(part)

    def release_inputs(self) -> None:
        """Release the part's input files, after the part was recorded."""
        while self.used and self.encoder is not None:
            self.source.done_with(self.used.pop())

    def _copies(self) -> Iterator[tuple[dict[str, Any], Path]]:
        """Yield each file with the path of a local copy, and fetch the next file meanwhile."""
        fetching = None
        for number, file in enumerate(self.files):
            if fetching is None:
                fetching = in_background(self.source.fetch, file)
            self.display.waiting_for = file["path"]
            path = fetching.result()
            self.display.waiting_for = None
            fetching = None
            # With max_tokens, this file may be the last one: a token takes 2 to 4 bytes in most kinds of files.
            if number + 1 < len(self.files) and (self.tokens_left is None or self.tokens_left > file["bytes"] / 4):
                fetching = in_background(self.source.fetch, self.files[number + 1])
            yield file, path

    def _records(self, part: int) -> Iterator[Record]:
        for _ in range(sum(file["part"] == part for file in self.files)):
            file, path = next(self.copies)
            self.used.append(path)
            yield from self.source.records(file, path, self.display.progress)
            self.display.progress.bytes_done += file["bytes"]
            self.display.progress.bytes_here = 0

    def _tokenize(self, part: int) -> dict[str, Any]:
        writers = {}
        for split in SPLITS:
            prefix = f"{self.plan.name}_{split}_{part:05d}"
            for stale in [*self.out.glob(f"{glob.escape(prefix)}*"), *self.out.glob(f".{glob.escape(prefix)}*")]:
                stale.unlink()  # from an interrupted run
            writers[split] = ShardWriter(self.out, prefix, shard_tokens=self.plan.shard_tokens, executor=self.finisher)
        is_full = False
        try:
            with contextlib.closing(self.encoder.encode(self._records(part))) as batches:
                for tokens, lengths, is_val in batches:
                    if self.tokens_left is not None:
                        count = int(np.searchsorted(np.cumsum(lengths), self.tokens_left, side="right"))
                        is_full = count < len(lengths)
                        lengths, is_val = lengths[:count], is_val[:count]
                        tokens = tokens[: lengths.sum()]
                        self.tokens_left -= len(tokens)
                    if is_val.any():
                        val_mask = np.repeat(is_val, lengths)
                        writers["val"].add(tokens[val_mask], lengths[is_val])
                        writers["train"].add(tokens[~val_mask], lengths[~is_val])
                    else:
                        writers["train"].add(tokens, lengths)
                    self.display.update(len(tokens), len(lengths))
                    if is_full:
                        break
            shards = [
                {"file": shard.pop("file"), "split": split, "part": part, **shard}
                for split in SPLITS
                for shard in writers[split].finish()
            ]
        finally:
            for writer in writers.values():
                writer.abandon()
        return {"part": part, "shards": shards, "is_full": is_full}

    def _import_shard(self, part: int) -> dict[str, Any]:
        file, path = next(self.copies)
        entry = self.source.import_shard(file, path, self.out)
        self.display.progress.bytes_done += file["bytes"]
        self.display.update(entry["tokens"], entry["documents"])
        shard = {"file": entry.pop("file"), "split": entry.pop("split"), "part": part, **entry}
        return {"part": part, "shards": [shard], "is_full": False}


class _Display:
    """Show the progress: a bar on a terminal, lines otherwise."""

    def __init__(self, progress: Progress, max_tokens: int | None, log: Callable[[str], object]) -> None:
        self.progress, self._max_tokens, self._log = progress, max_tokens, log
        self.waiting_for: str | None = None
        self._tokens = self._documents = 0
        self._at_start = progress.bytes_done
        self._started = self._last_line = time.monotonic()
        self._bar = tqdm(
            total=100.0,
            bar_format="{percentage:3.0f}% |{bar:25}| {desc}",
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> Self:
        self._stopped = threading.Event()
        threading.Thread(target=self._show_waiting, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stopped.set()
        if self._tokens:
            self._log(self._line())
        self._bar.close()

    def _show_waiting(self) -> None:
        while not self._stopped.wait(_SECONDS_BETWEEN_LINES):
            if self.waiting_for is not None:
                self._log(f"download  waiting for {self.waiting_for}")

    def update(self, num_tokens: int, num_documents: int) -> None:
        """Add to the counts and show them, unless they were shown just before."""
        self._tokens += num_tokens
        self._documents += num_documents
        now = time.monotonic()
        if now - self._last_line > (_SECONDS_BETWEEN_LINES if self._bar.disable else 0.1):
            self._last_line = now
            if self._bar.disable:
                self._log(self._line())
            else:
                self._bar.n = 100 * self._fraction()
                self._bar.set_description_str(self._line().removeprefix("tokens    "))

    def _fraction(self) -> float:
        bytes_read = self.progress.bytes_done + min(self.progress.bytes_here, self.progress.total_bytes)
        fraction = bytes_read / max(1, self.progress.total_bytes)
        if self._max_tokens is not None:
            fraction = max(fraction, self._tokens / self._max_tokens)
        return min(1.0, fraction)

    def _line(self) -> str:
        seconds = time.monotonic() - self._started
        done, at_start = self._fraction(), self._at_start / max(1, self.progress.total_bytes)
        left = ""
        if done > at_start:
            left = f", {timedelta(seconds=round((1 - done) / (done - at_start) * seconds))} left"
        return (
            f"tokens    {self._tokens:,} of {self._documents:,} documents, {self._documents / seconds:,.0f} "
            f"documents/s, {self._tokens / seconds / 1e6:.2f}M tokens/s{left}"
        )


# ----------------------------------------------------------------------------------------------------------
# Joining the parts.


def finish(out: str | Path) -> Manifest | None:
    """
    Write the manifest if all parts are finished, and remove their records.

    Returns:
        The manifest, or None if parts are missing.

    Raises:
        DataError: a split has no documents.
    """
    out = Path(out)
    with _locked(out):
        plan = read_manifest(out)
        if plan is None:
            plan, part_records = read_manifest(out, PREPARING), _part_records(out)
            if not _is_complete(plan, part_records):
                return None
            plan.shards = [shard for part in sorted(part_records) for shard in part_records[part]["shards"]]
            for split in SPLITS:
                if not plan.total(split, "tokens"):
                    for shard in plan.shards:
                        if not Path(shard["file"]).is_absolute() and plan.source["kind"] != "pretokenized":
                            (out / shard["file"]).unlink(missing_ok=True)
                    shutil.rmtree(out / _PARTS)
                    (out / PREPARING).unlink()
                    raise DataError(
                        f"the {split} split has no documents (val_fraction {plan.val_fraction}): give more documents "
                        "(--separator splits a long text into several) or another --val_fraction"
                    )
            plan.write(out / MANIFEST)
        (out / PREPARING).unlink(missing_ok=True)
        shutil.rmtree(out / _PARTS, ignore_errors=True)
        downloads = out / _DOWNLOADS
        shutil.rmtree(downloads / ".cache", ignore_errors=True)  # written by huggingface_hub
        if not any(path.is_file() for path in downloads.rglob("*")):
            shutil.rmtree(downloads, ignore_errors=True)
    return plan


def merge(folders: Sequence[str | Path], out: str | Path) -> Manifest:
    """
    Merge the folders in which several machines prepared their parts of the same source.

    Args:
        folders: the machines' folders; `out` may be one of them.
        out: the folder to make.

    Raises:
        DataError: a folder has no parts, the parts are of different preparations, or a part is missing.
    """
    out = Path(out)
    if (out / MANIFEST).exists():
        raise DataError(f"{out} is already prepared; choose another --out")
    plan = None
    for folder in map(Path, folders):
        folder_plan = read_manifest(folder, PREPARING)
        if folder_plan is None:
            raise DataError(f"{folder} has no parts of a preparation (no {PREPARING} in it)")
        if plan is None:
            plan = folder_plan
        elif asdict(folder_plan) | {"versions": None} != asdict(plan) | {"versions": None}:
            raise DataError(f"{folder} and {folders[0]} are not parts of the same preparation")
    (out / _PARTS).mkdir(parents=True, exist_ok=True)
    if not (out / PREPARING).exists():
        plan.write(out / PREPARING)
    for folder in map(Path, folders):
        if folder.resolve() != out.resolve():
            for part, part_record in _part_records(folder).items():
                for shard in part_record["shards"]:
                    _copy_shard(folder, shard, out)
                write_json_with_checksum(out / _PARTS / f"{part:05d}.json", part_record)
    manifest = finish(out)
    if manifest is None:
        missing = sorted(set(range(plan.num_parts)) - _part_records(out).keys())
        raise DataError(
            f"of {plan.num_parts} parts, {len(missing)} are missing: {', '.join(map(str, missing[:20]))}"
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


# ----------------------------------------------------------------------------------------------------------
# The command.


def source_of(
    settings: Mapping[str, Any], *, out: str | Path, keep: bool = False, max_tokens: int | None = None
) -> Source:
    """
    Make the source that has these settings.

    Args:
        settings: settings of a source, or `Manifest.source`, which also has the provenance.
        out: the folder to make; downloads go into it.
        keep: see HubSource.
        max_tokens: see data.pretokenized.
    """
    kind = settings["kind"]
    options = {key: settings[key] for key in ("text_column", "separator", "errors") if key in settings}
    repository = None
    if "dataset" in settings:
        repository = HubRepository(
            settings["dataset"],
            revision=settings["asked_revision"],
            commit=settings.get("revision"),
            download_folder=Path(out) / _DOWNLOADS,
        )
    if kind == "sample":
        return SampleSource()
    if kind == "files":
        return FileSource(settings["paths"], **options)
    if kind == "hub":
        return HubSource(repository, subset=settings["subset"], keep=keep, **options)
    if repository is not None:
        return HubShards(repository, max_tokens=max_tokens)
    return LocalShards(settings["folder"], max_tokens=max_tokens)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m data.prepare",
        description="Make shards of GPT-2 tokens from text. After an interruption, the same command resumes.",
    )
    commands = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        subparser = commands.add_parser(name, help=help, description=help)
        subparser.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
        return subparser

    sample = command("sample", "Python's own documentation; needs no network")
    fineweb_edu = command("fineweb-edu", "HuggingFaceFW/fineweb-edu from the Hub, 10 billion tokens by default")
    fineweb = command("fineweb", "HuggingFaceFW/fineweb from the Hub, 10 billion tokens by default")
    hub = command("hub", "any text data set on the Hub")
    files = command("files", "your own files: .txt and .jsonl (also .gz, .xz, .zst), .parquet")
    pretokenized = command("pretokenized", "shards made by others, in llm.c's format or build-nanogpt's .npy")
    merging = command("merge", "merge the folders that --shard_count made on several machines")
    merging.add_argument("folders", nargs="+", metavar="PART_DIR", help="the folders to merge")

    hub.add_argument("--dataset", required=True, metavar="OWNER/NAME", help="id of the data set on the Hub")
    pretokenized.add_argument("where", metavar="OWNER/NAME|FOLDER", help="a data set on the Hub, or a local folder")
    files.add_argument(
        "paths", nargs="+", metavar="PATH", help='files, folders of them, or patterns ("notes/**/*.txt")'
    )
    for source, subset in ((fineweb_edu, "sample-10BT"), (fineweb, "sample-10BT"), (hub, None)):
        source.add_argument("--subset", default=subset, help="subset of the data set (default: %(default)s)")
        source.add_argument("--keep_parquet", action="store_true", help="keep the downloaded files, in DIR/downloads")
    for source in (fineweb_edu, fineweb, hub, pretokenized):
        source.add_argument("--revision", default="main", help="branch, tag or commit (default: %(default)s)")
    for source in (fineweb_edu, fineweb, hub, files):
        source.add_argument("--text_column", default="text", help="column or key of the text (default: %(default)s)")
        source.add_argument(
            "--errors",
            choices=("strict", "replace"),
            default="strict",
            help="for bytes that are not UTF-8: stop, or replace them with U+FFFD (default: %(default)s)",
        )
    for source in (hub, files):
        source.add_argument(
            "--separator",
            type=lambda text: text.replace(r"\n", "\n").replace(r"\t", "\t"),  # as typed in a shell
            help=r"text between the documents of a .txt file, \n for a line break (default: each file is a document)",
        )
    for source in (fineweb_edu, fineweb, hub, files, pretokenized):
        source.add_argument("--max_tokens", type=_integer, help="maximum number of tokens, for example 1e9")
        source.add_argument("--shard_index", type=int, default=0, help="index of this machine, 0 to shard_count - 1")
        source.add_argument("--shard_count", type=int, default=1, help="number of machines that divide the files")
    for source in (fineweb_edu, fineweb, hub, files):
        source.add_argument(
            "--shard_tokens", type=_integer, default=_SHARD_TOKENS, help="maximum number of tokens in a shard"
        )
    for source, fraction in (*((s, 0.01) for s in (fineweb_edu, fineweb, hub, files)), (sample, _SAMPLE_VAL_FRACTION)):
        source.add_argument(
            "--val_fraction",
            type=float,
            default=fraction,
            help="fraction of the documents for validation (default: %(default)s)",
        )
        source.add_argument(
            "--num_proc", type=int, default=_cores(), help="tokenizer processes (default: all cores, %(default)s)"
        )
        source.add_argument(
            "--tokenizer_backend",
            choices=TOKENIZER_BACKENDS,
            default="tiktoken",
            help='gigatoken gives the same tokens as tiktoken, faster (pip install -e ".[fast]")',
        )
        source.add_argument("--engine", choices=TOKENIZER_BACKENDS, help=argparse.SUPPRESS)  # the name before 2026-12
    return parser


def _integer(text: str) -> int:
    """Parse an int, also written 1e9 or 1_000_000."""
    try:
        value = float(text)
        if value == int(value):
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not an integer; write 1000000 or 1e6")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the source that the arguments describe."""
    if args.source == "sample":
        return {"kind": "sample"}
    if args.source == "pretokenized":
        if Path(args.where).is_dir() or args.where.count("/") != 1 or args.where.startswith((".", "~", "/")):
            return {"kind": "pretokenized", "folder": args.where}
        return {"kind": "pretokenized", "dataset": args.where, "asked_revision": args.revision}
    settings = {"text_column": args.text_column, "errors": args.errors}
    if args.source == "files":
        return {**settings, "kind": "files", "paths": args.paths, "separator": args.separator}
    dataset = args.dataset if args.source == "hub" else f"HuggingFaceFW/{args.source}"
    return {
        **settings,
        "kind": "hub",
        "dataset": dataset,
        "subset": args.subset,
        "asked_revision": args.revision,
        "separator": getattr(args, "separator", None),
    }


def _main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    if getattr(args, "engine", None) is not None:
        print("--engine is now called --tokenizer_backend", file=sys.stderr)
        args.tokenizer_backend = args.engine
    try:
        if args.source == "merge":
            manifest = merge(args.folders, args.out)
        else:
            source = source_of(
                _settings(args),
                out=args.out,
                keep=getattr(args, "keep_parquet", False),
                max_tokens=getattr(args, "max_tokens", None),
            )
            options = {
                key: getattr(args, key)
                for key in (
                    "val_fraction",
                    "shard_tokens",
                    "max_tokens",
                    "num_proc",
                    "tokenizer_backend",
                    "shard_index",
                    "shard_count",
                )
                if hasattr(args, key)
            }
            name = "sample" if args.source == "sample" else Path(args.out).resolve().name
            manifest = prepare(source, args.out, name=name, log=tqdm.write, **options)
    except UserError as error:
        raise DataError(f"{error}{kept_parts(args.out)}") from error
    except KeyboardInterrupt:
        print_interrupted(f"interrupted{kept_parts(args.out) or ': nothing was kept'}")
        return interrupt_exit_code()
    if manifest is None:
        print(
            f"parts {args.shard_index}, {args.shard_index + args.shard_count}, ... are done in {args.out}. If all "
            "machines write to this folder, the last one merges the parts. Otherwise run:\n"
            f"python -m data.prepare merge {shell_quote(args.out)} ... --out DIR"
        )
        return 0
    for split in SPLITS:
        print(
            f"{split:9s} {manifest.total(split, 'documents'):,} documents, {manifest.total(split, 'tokens'):,} tokens"
        )
    print(f"in        {args.out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; see `common.cli.run_command`."""
    return run_command(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
