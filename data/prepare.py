"""
Text to shards:

    python -m data.prepare sample --out shards/sample
    python -m data.prepare fineweb-edu --out shards/fineweb-edu
    python -m data.prepare hub --dataset OWNER/NAME --subset S --text_column C --out shards/theirs
    python -m data.prepare files book.txt part_records/ "logs/**/*.jsonl.zst" --out shards/own_parts
    python -m data.prepare pretokenized kjj0/finewebedu10B-gpt2 --out shards/fineweb-edu

The input's files are gathered into parts, a large file being a part of its own. Each part is fetched, tokenised,
written, read again and noted down in DIR/parts; when all are there, DIR/manifest.json is written and the part_records go. A
part's shards depend on nothing but the part, so that an interrupted preparation goes on with the next one, and several
machines can share them out (--shard_index, --shard_count), with the same bytes in the end.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from importlib import metadata
from pathlib import Path

from common.cli import Parser, interrupt_exit_code, prepare_process, print_interrupted, run_command, shell_quote

if __name__ == "__main__":
    prepare_process()

import numpy as np
from tqdm import tqdm

from common.files import atomic_write
from common.locks import Lock, Timeout
from data import DataError
from data.encode import SPLIT_RULE, Encoder
from data.hub import HubRepository, HubSource, in_background
from data.manifest import MANIFEST, PREPARING, SPLITS, Manifest, read_manifest, read_json_with_checksum, write_json_with_checksum
from data.pretokenized import HubShards, LocalShards
from data.shards import MAX_TOKENS, ShardWriter, scan_shard
from data.sources import FileSource, Progress, SampleSource
from data.tokenizer import TOKENIZER_BACKENDS

_SHARD_TOKENS = 100_000_000  # llm.c's, 200 MB
_PART_BYTES = 2**28  # small files are gathered until they are this large together
_SAMPLE_VAL_FRACTION = 0.05
_PARTS, _DOWNLOADS, _LOCK = "parts", "downloads", ".lock"
_SECONDS_BETWEEN_LINES = 30

# Bytes of shards for a byte of input: a token is two bytes, and stands for about 4.3 of English.
_SHARDS_PER_BYTE = {".txt": 0.5, ".jsonl": 0.5, ".parquet": 0.75, ".gz": 1.4, ".zst": 1.7, ".xz": 1.9}


def prepare(
    source,
    out,
    *,
    name,
    val_fraction=None,
    shard_tokens=_SHARD_TOKENS,
    max_tokens=None,
    num_proc=1,
    tokenizer_backend="tiktoken",
    shard_index=0,
    shard_count=1,
    log=lambda line: None,
):
    """
    Makes a folder of shards with a manifest, or goes on making it.

    A document never crosses two shards. The shards' bytes depend on the source, `val_fraction`, `shard_tokens` and
    `max_tokens`; not on `num_proc`, `tokenizer_backend`, `shard_count` or on how often this was interrupted.

    Args:
        source: see data.sources; or shards to adopt, see data.pretokenized.
        out: the folder.
        name: the shards' names begin with it: {name}_train_00000000.bin, 5 digits for the part, 3 within it.
        val_fraction: share of the documents that become validation; None for shards to adopt.
        shard_tokens: most tokens in a shard (a longer document has a shard to itself).
        max_tokens: stop before the document with which it would be more.
        num_proc: processes that tokenise.
        tokenizer_backend: see data.tokenizer.load_encoder.
        shard_index, shard_count: prepare only every shard_count-th part, from shard_index on.
        log: called with lines for the user.

    Returns:
        Manifest; None if parts are missing that others have to prepare.

    Raises:
        DataError: the folder holds something else, the source's own errors, a split without documents, a full disk,
            a process that was killed. Finished parts are kept.
    """
    out = Path(out)
    _check_numbers(val_fraction, num_proc, shard_tokens, max_tokens, shard_index, shard_count)
    is_new = not out.exists()
    try:
        plan = _open_plan(source, out, name, val_fraction, shard_tokens, max_tokens, tokenizer_backend)
        if plan.shards:
            log(f"{out} is prepared already: nothing to do")
            return finish(out)  # which clears up where that was interrupted
        own_parts = [part for part in range(plan.num_parts) if part % shard_count == shard_index]
        _check_disk(plan, source, out, own_parts, log)
        _prepare_parts(plan, source, out, own_parts, num_proc=num_proc, tokenizer_backend=tokenizer_backend, log=log)
        return finish(out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = error.filename or out
            raise DataError(f"no room for {where} on its disk; make room or choose another --out") from error
        raise DataError(f"{out} was not made: {error}; mend that or choose another --out") from error
    finally:
        if is_new and shard_count == 1 and out.is_dir() and not _has_finished_work(out):
            shutil.rmtree(out)


def prepare_sample(out, *, val_fraction=_SAMPLE_VAL_FRACTION, **options):
    """The offline sample corpus; train.py makes it when a recipe asks for it. See `prepare`."""
    return prepare(SampleSource(), out, name="sample", val_fraction=val_fraction, **options)


def _check_numbers(val_fraction, num_proc, shard_tokens, max_tokens, shard_index, shard_count):
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise DataError(f"--val_fraction must be between 0 and 1, got {val_fraction}")
    if num_proc < 1:
        raise DataError(f"--num_proc must be at least 1, got {num_proc}")
    if not 1 <= shard_tokens <= MAX_TOKENS:
        raise DataError(f"--shard_tokens must be 1 to {MAX_TOKENS:,}, got {shard_tokens}")
    if max_tokens is not None and max_tokens < 1:
        raise DataError(f"--max_tokens must be at least 1, got {max_tokens}")
    if not 0 <= shard_index < shard_count:
        raise DataError(f"--shard_index must be 0 to --shard_count - 1, got {shard_index} of {shard_count}")
    if max_tokens is not None and shard_count > 1:
        raise DataError("--max_tokens counts from the first document on, which --shard_count divides: give one of them")


# ----------------------------------------------------------------------------------------------------------
# What is to be done, and what is done already.


def _open_plan(source, out, name, val_fraction, shard_tokens, max_tokens, tokenizer_backend):
    """The folder's plan: a Manifest without shards. With shards, it is finished."""
    if out.is_symlink() and not out.exists():
        raise DataError(f"{out} is a link that leads nowhere; remove it or choose another --out")
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; choose another --out")
    asked = {
        "source": source.settings,
        "val_fraction": val_fraction,
        "shard_tokens": None if val_fraction is None else shard_tokens,
        "max_tokens": max_tokens,
    }
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        plan = read_manifest(out) or read_manifest(out, PREPARING)
        if plan is not None:
            state = "is there already" if plan.shards else "was begun"
            _check_same_settings(plan, asked, f"{out} {state} with")
            if plan.shards:
                return plan
            if hasattr(source, "repository"):
                source.repository.pin(plan.source["revision"])
            else:
                _accept_changed_inputs(plan, source, out)
            return plan
        if any(not entry.name.startswith(".") for entry in out.iterdir()) and not _is_source_folder(source, out):
            raise DataError(f"{out} is there already and has something else in it; remove it or choose another --out")
        plan = Manifest(
            name=name,
            inputs=_assign_parts(source),
            source={**source.settings, **source.provenance},
            split_rule=SPLIT_RULE if val_fraction is not None else "as its maker dealt them: by the files' names",
            versions=_versions(tokenizer_backend),
            **{key: value for key, value in asked.items() if key != "source"},
        )
        plan.write(out / PREPARING)
    return plan


@contextlib.contextmanager
def _locked(out):
    """Where only one process is at a time. The lock's file goes when the folder is not in preparation (any more)."""
    path = out / _LOCK
    with Lock(path, warn=_warn):
        try:
            yield
        finally:
            if not (out / PREPARING).exists():
                with contextlib.suppress(PermissionError):  # Windows does not remove open files; filelock does it there
                    path.unlink(missing_ok=True)


def _check_same_settings(plan, asked, what):
    """Raises where a folder's plan is not what is asked for now."""
    was = {"val_fraction": plan.val_fraction, "shard_tokens": plan.shard_tokens, "max_tokens": plan.max_tokens}
    was |= {key: plan.source.get(key) for key in plan.source.keys() & asked["source"].keys() | {"kind"}}
    now = {**{key: value for key, value in asked.items() if key != "source"}, **asked["source"]}
    for key, value in now.items():
        if was.get(key) != value:
            raise DataError(
                f"{what} {key} {was.get(key)!r}, and not {value!r}; give the same, choose another --out, or remove it"
            )


def _assign_parts(source):
    """The source's files with the part each belongs to."""
    files, part, size = [], 0, 0
    limit = 0 if hasattr(source, "import_shard") else _PART_BYTES
    for file in source.inputs():
        if files and size + file["bytes"] > limit:
            part, size = part + 1, 0
        files.append({**file, "part": part})
        size += file["bytes"]
    return files


def _accept_changed_inputs(plan, source, out):
    """Takes over that files have changed whose part is not done yet: as a rule, somebody mended them."""
    now, part_records = source.inputs(), _part_records(out)
    if [file["path"] for file in now] != [file["path"] for file in plan.inputs]:
        raise DataError(f"{out} was begun with other files; choose another --out, or remove it")
    for file, was in zip(now, plan.inputs, strict=True):
        if file["bytes"] != was["bytes"] and was["part"] in part_records:
            raise DataError(f"{file['path']} has changed since its part of {out} was made; remove {out}")
    inputs = [{**file, "part": was["part"]} for file, was in zip(now, plan.inputs, strict=True)]
    if inputs != plan.inputs:
        plan.inputs = inputs
        plan.write(out / PREPARING)


def _is_source_folder(source, out):
    return isinstance(source, LocalShards) and source.folder.resolve() == out.resolve()


def _versions(tokenizer_backend):
    """What the tokens depend on, for the manifest."""
    versions = {"python": platform.python_version(), "tiktoken": metadata.version("tiktoken")}
    for package in ("gpt2-repro", *([tokenizer_backend] if tokenizer_backend != "tiktoken" else [])):
        with contextlib.suppress(metadata.PackageNotFoundError):  # the rooms run from a checkout, installed or not
            versions[package] = metadata.version(package)
    return versions


def _part_records(out):
    """{part: part_record} of the finished parts; a part_record is {"part", "shards", "is_full"}."""
    mend = "remove it, and its part is made again"
    part_records = [read_json_with_checksum(path, mend) for path in sorted((out / _PARTS).glob("*.json"))]
    return {part_record["part"]: part_record for part_record in part_records}


def _is_complete(plan, part_records):
    """Whether no part is missing. A part that filled max_tokens is the last."""
    full = [part for part, part_record in part_records.items() if part_record["is_full"]]
    last = min(full) if full else plan.num_parts - 1
    return all(part in part_records for part in range(last + 1))


def _has_finished_work(out):
    return any(True for _ in (out / _PARTS).glob("*.json")) or any(
        (out / name).exists() for name in (MANIFEST, _DOWNLOADS)
    )


def kept_parts(out):
    """Half a sentence for an error message: what a next try need not do again."""
    with contextlib.suppress(DataError, OSError):
        plan, part_records = read_manifest(out, PREPARING), _part_records(Path(out))
        if plan is not None and part_records:
            return f". {len(part_records)} of {plan.num_parts} parts are kept in {out}: the same command goes on from there"
    return ""


def _check_disk(plan, source, out, own_parts, log):
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
        needed += sum(sizes) if source.keep else sum(sizes[:2])  # one is read while the next comes
    free = shutil.disk_usage(out).free
    log(f"disk      about {needed / 1e9:,.2f} GB needed in {out} (an estimate), {free / 1e9:,.1f} GB free")
    if needed > free:
        raise DataError(
            f"{out} needs about {needed / 1e9:,.2f} GB (an estimate), and its disk has {free / 1e9:,.2f} GB free; "
            "make room, choose another --out, or give --max_tokens"
        )


# ----------------------------------------------------------------------------------------------------------
# Doing it.


def _prepare_parts(plan, source, out, own_parts, *, num_proc, tokenizer_backend, log):
    part_records = _part_records(out)
    if _is_complete(plan, part_records):
        return
    pending = [part for part in own_parts if part not in part_records]
    (out / _PARTS).mkdir(exist_ok=True)
    progress = Progress(sum(file["bytes"] for file in plan.inputs if file["part"] in own_parts))
    progress.bytes_done = sum(file["bytes"] for file in plan.inputs if file["part"] in own_parts and file["part"] in part_records)
    if progress.bytes_done:
        log(f"resume    {len(own_parts) - len(pending)} of {len(own_parts)} parts are done")
    earlier_shards = [shard for part_record in part_records.values() for shard in part_record["shards"]]
    with (
        _Display(progress, plan.max_tokens, log) as display,
        _PartMaker(plan, source, out, pending, display, earlier_shards, num_proc=num_proc, tokenizer_backend=tokenizer_backend) as work,
    ):
        for part in pending:
            with _part_lock(out, part):
                part_record = part_maker.make(part)
                write_json_with_checksum(out / _PARTS / f"{part:05d}.json", part_record)
                part_maker.release_inputs()
            if part_record["is_full"]:
                return


def make_part(manifest, source, part, out, *, num_proc):
    """
    One part again, for a folder that is finished.

    Args:
        manifest: of that folder.
        source: as `source_of` gives it.
        part: its number.
        out: where the part's shards go.
        num_proc: processes that tokenise.

    Returns:
        the part's shards, as in a manifest.
    """
    progress = Progress(sum(file["bytes"] for file in manifest.inputs if file["part"] == part))
    earlier_shards = [shard for shard in manifest.shards if shard["part"] < part]
    with (
        _Display(progress, None, lambda line: None) as display,
        _PartMaker(manifest, source, out, [part], display, earlier_shards, num_proc=num_proc, tokenizer_backend="tiktoken") as work,
    ):
        return part_maker.make(part)["shards"]


@contextlib.contextmanager
def _part_lock(out, part):
    lock = Lock(out / _PARTS / f"{part:05d}.lock", warn=_warn)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise DataError(
            f"another process is preparing part {part} of {out}; wait for it, or stop it and run this again"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _warn(line: str) -> None:
    print(line, file=sys.stderr)


class _PartMaker:
    """Makes parts, in order, with one pool of processes and the next file on its way."""

    def __init__(self, plan, source, out, parts, display, earlier_shards, *, num_proc, tokenizer_backend):
        """
        Args:
            plan, source, out: see `prepare`.
            parts: those to make.
            display: _Display.
            earlier_shards: entries of the shards before them, which count for max_tokens.
        """
        self.plan, self.source, self.out, self.display = plan, source, out, display
        self.files = [file for file in plan.inputs if file["part"] in parts]
        self.copies, self.used = self._copies(), []
        self.left = None  # tokens until max_tokens
        self.encoder = None
        if not hasattr(source, "import_shard"):
            self.encoder = Encoder(
                num_proc=num_proc,
                val_fraction=plan.val_fraction,
                text_column=plan.source.get("text_column", "text"),
                errors=plan.source.get("errors", "strict"),
                tokenizer_backend=tokenizer_backend,
            )
            if plan.max_tokens is not None:
                self.left = plan.max_tokens - sum(shard["tokens"] for shard in earlier_shards)
        self.finisher = ThreadPoolExecutor(1)

    def __enter__(self):
        if self.encoder is not None:
            self.encoder.__enter__()
        return self

    def __exit__(self, *error):
        if self.encoder is not None:
            self.encoder.__exit__(*error)
        self.finisher.shutdown()

    def make(self, part):
        """The part's part_record: {"part", "shards", "is_full"}."""
        return self._import_shard(part) if self.encoder is None else self._tokenize(part)

    def release_inputs(self):
        """When the part is noted down: nobody needs its files any more."""
        while self.used and self.encoder is not None:
            self.source.done_with(self.used.pop())

    def _copies(self):
        """(file, path of a local copy) of each, the next one on its way meanwhile."""
        coming = None
        for number, file in enumerate(self.files):
            if coming is None:
                coming = in_background(self.source.fetch, file)
            self.display.waiting_for = file["path"]
            path = coming.result()
            self.display.waiting_for = None
            coming = None
            # With max_tokens, this one may be the last: a token is 2 to 4 bytes of most kinds of file.
            if number + 1 < len(self.files) and (self.left is None or self.left > file["bytes"] / 4):
                coming = in_background(self.source.fetch, self.files[number + 1])
            yield file, path

    def _records(self, part):
        for _ in range(sum(file["part"] == part for file in self.files)):
            file, path = next(self.copies)
            self.used.append(path)
            yield from self.source.records(file, path, self.display.progress)
            self.display.progress.bytes_done += file["bytes"]
            self.display.progress.bytes_here = 0

    def _tokenize(self, part):
        writers = {}
        for split in SPLITS:
            prefix = f"{self.plan.name}_{split}_{part:05d}"
            for stale in [*self.out.glob(f"{glob.escape(prefix)}*"), *self.out.glob(f".{glob.escape(prefix)}*")]:
                stale.unlink()  # of an interrupted try
            writers[split] = ShardWriter(self.out, prefix, shard_tokens=self.plan.shard_tokens, executor=self.finisher)
        is_full = False
        try:
            with contextlib.closing(self.encoder.encode(self._records(part))) as batches:
                for tokens, lengths, is_val in batches:
                    if self.left is not None:
                        fitting = int(np.searchsorted(np.cumsum(lengths), self.left, side="right"))
                        is_full = fitting < len(lengths)
                        lengths, is_val = lengths[:fitting], is_val[:fitting]
                        tokens = tokens[: lengths.sum()]
                        self.left -= len(tokens)
                    if is_val.any():
                        of_val = np.repeat(is_val, lengths)
                        writers["val"].add(tokens[of_val], lengths[is_val])
                        writers["train"].add(tokens[~of_val], lengths[~is_val])
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

    def _import_shard(self, part):
        file, path = next(self.copies)
        entry = self.source.import_shard(file, path, self.out)
        self.display.progress.bytes_done += file["bytes"]
        self.display.update(entry["tokens"], entry["documents"])
        shard = {"file": entry.pop("file"), "split": entry.pop("split"), "part": part, **entry}
        return {"part": part, "shards": [shard], "is_full": False}


class _Display:
    """How far it is, on a terminal as a bar, into a file as lines."""

    def __init__(self, progress, max_tokens, log):
        self.progress, self._max_tokens, self._log = progress, max_tokens, log
        self.waiting_for = None
        self._tokens = self._documents = 0
        self._at_start = progress.bytes_done
        self._started = self._last_line = time.monotonic()
        self._bar = tqdm(
            total=100.0,
            bar_format="{percentage:3.0f}% |{bar:25}| {desc}",
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self):
        self._over = threading.Event()
        threading.Thread(target=self._show_waiting, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._over.set()
        if self._tokens:
            self._log(self._line())
        self._bar.close()

    def _show_waiting(self):
        while not self._over.wait(_SECONDS_BETWEEN_LINES):
            if self.waiting_for is not None:
                self._log(f"download  waiting for {self.waiting_for}")

    def update(self, num_tokens, num_documents):
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

    def _fraction(self):
        read = self.progress.bytes_done + min(self.progress.bytes_here, self.progress.total_bytes)
        fraction = read / max(1, self.progress.total_bytes)
        if self._max_tokens is not None:
            fraction = max(fraction, self._tokens / self._max_tokens)
        return min(1.0, fraction)

    def _line(self):
        seconds = time.monotonic() - self._started
        done, before = self._fraction(), self._at_start / max(1, self.progress.total_bytes)
        left = ""
        if done > before:
            left = f", {timedelta(seconds=round((1 - done) / (done - before) * seconds))} left"
        return (
            f"tokens    {self._tokens:,} of {self._documents:,} documents, {self._documents / seconds:,.0f} "
            f"documents/s, {self._tokens / seconds / 1e6:.2f}M tokens/s{left}"
        )


# ----------------------------------------------------------------------------------------------------------
# Many parts to one whole.


def finish(out):
    """
    Writes the manifest when no part is missing any more, and removes the part_records it is made of.

    Returns:
        Manifest, or None if parts are missing.

    Raises:
        DataError: a split without documents.
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
                        f"no document fell into the {split} split (val_fraction {plan.val_fraction}): give more "
                        "documents (--separator splits a long text into several) or another --val_fraction"
                    )
            plan.write(out / MANIFEST)
        (out / PREPARING).unlink(missing_ok=True)
        shutil.rmtree(out / _PARTS, ignore_errors=True)
        downloads = out / _DOWNLOADS
        shutil.rmtree(downloads / ".cache", ignore_errors=True)  # the client's
        if not any(path.is_file() for path in downloads.rglob("*")):
            shutil.rmtree(downloads, ignore_errors=True)
    return plan


def merge(folders, out):
    """
    Makes one folder of those in which several machines prepared their parts of the same source.

    Args:
        folders: what they made; `out` may be among them.
        out: the folder to make.

    Returns:
        Manifest.

    Raises:
        DataError: a folder that is not one of these, parts of different preparations, a part that is missing.
    """
    out = Path(out)
    if (out / MANIFEST).exists():
        raise DataError(f"{out} is prepared already; choose another --out")
    plan = None
    for folder in map(Path, folders):
        found = read_manifest(folder, PREPARING)
        if found is None:
            raise DataError(f"{folder} holds no parts of a preparation (no {PREPARING} in it)")
        if plan is None:
            plan = found
        elif asdict(found) | {"versions": None} != asdict(plan) | {"versions": None}:
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


def _copy_shard(folder, shard, out):
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


def source_of(settings, *, out, keep=False, max_tokens=None):
    """
    The source that has these settings.

    Args:
        settings: a source's own, or those in a manifest, which have the revision that was found, too.
        out: the folder, where downloads go.
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


def _parser():
    parser = Parser(
        prog="python -m data.prepare",
        description="Text to shards of GPT-2 tokens. Interrupted, the same command goes on where it stopped.",
    )
    commands = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")

    def command(name, help):
        added = commands.add_parser(name, help=help, description=help)
        added.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
        return added

    sample = command("sample", "English that every Python carries; needs no network")
    fineweb_edu = command("fineweb-edu", "HuggingFaceFW/fineweb-edu from the Hub, 10 billion tokens by default")
    fineweb = command("fineweb", "HuggingFaceFW/fineweb from the Hub, 10 billion tokens by default")
    hub = command("hub", "any text data set on the Hub")
    files = command("files", "files of your own: .txt and .jsonl (also .gz, .xz, .zst), .parquet")
    pretokenized = command("pretokenized", "shards that others made, in llm.c's format or build-nanogpt's .npy")
    merging = command("merge", "one folder of those that --shard_count made on several machines")
    merging.add_argument("folders", nargs="+", metavar="PART_DIR", help="what each of them made")

    hub.add_argument("--dataset", required=True, metavar="OWNER/NAME", help="its name on the Hub")
    pretokenized.add_argument("where", metavar="OWNER/NAME|FOLDER", help="a data set on the Hub, or a folder here")
    files.add_argument(
        "paths", nargs="+", metavar="PATH", help='files, folders of them, or patterns ("part_records/**/*.txt")'
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
            help="what bytes that are not UTF-8 do: stop it, or become U+FFFD (default: %(default)s)",
        )
    for source in (hub, files):
        source.add_argument(
            "--separator",
            type=lambda text: text.replace(r"\n", "\n").replace(r"\t", "\t"),  # as one types them in a shell
            help=r"what is between documents of a .txt file, \n for a line break (default: a file is a document)",
        )
    for source in (fineweb_edu, fineweb, hub, files, pretokenized):
        source.add_argument("--max_tokens", type=_integer, help="no more tokens than this, 1e9 for example")
        source.add_argument("--shard_index", type=int, default=0, help="of this machine, 0 to shard_count - 1")
        source.add_argument("--shard_count", type=int, default=1, help="machines that share the files")
    for source in (fineweb_edu, fineweb, hub, files):
        source.add_argument("--shard_tokens", type=_integer, default=_SHARD_TOKENS, help="most tokens in a shard")
    for source, fraction in (*((s, 0.01) for s in (fineweb_edu, fineweb, hub, files)), (sample, _SAMPLE_VAL_FRACTION)):
        source.add_argument(
            "--val_fraction",
            type=float,
            default=fraction,
            help="share of documents for validation (default: %(default)s)",
        )
        source.add_argument(
            "--num_proc", type=int, default=_cores(), help="processes that tokenise (default: all cores, %(default)s)"
        )
        source.add_argument(
            "--tokenizer_backend",
            choices=TOKENIZER_BACKENDS,
            default="tiktoken",
            help='what tokenises; gigatoken gives the same tokens faster (pip install -e ".[fast]")',
        )
    return parser


def _integer(text):
    """An int, also written 1e9 or 1_000_000."""
    try:
        value = float(text)
        if value == int(value):
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number; write 1000000 or 1e6")


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _settings(args):
    """The arguments as a source's settings."""
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


def _main(argv):
    args = _parser().parse_args(argv)
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
    except DataError as error:
        raise DataError(f"{error}{kept_parts(args.out)}") from error
    except KeyboardInterrupt:
        print_interrupted(f"interrupted{kept_parts(args.out) or ': nothing was kept'}")
        return interrupt_exit_code()
    if manifest is None:
        print(
            f"parts {args.shard_index}, {args.shard_index + args.shard_count}, ... are done in {args.out}. The last of "
            "the machines that write there joins them all; what stands in several folders, this does:\n"
            f"python -m data.prepare merge {shell_quote(args.out)} ... --out DIR"
        )
        return 0
    for split in SPLITS:
        print(
            f"{split:9s} {manifest.total(split, 'documents'):,} documents, {manifest.total(split, 'tokens'):,} tokens"
        )
    print(f"in        {args.out}")
    return 0


def main(argv=None):
    """Run the command and return its exit code; see `common.cli.run_command`."""
    return run_command(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
