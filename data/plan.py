"""A preparation's plan, and the joining of finished tasks to shards.

DIR/preparing.json is the plan, a Manifest without shards. Finished tasks are in DIR/tasks (data/tasks.py). `Joiner`
takes them in order. When the next one would make more than shard_tokens, those before it become a part: its shards are
written, DIR/parts/00003.json records them, and the tasks' files are removed. `finish` writes DIR/manifest.json.
"""

import contextlib
import dataclasses
import glob
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np

from common.locks import Lock, Timeout
from data import DataError
from data.hub import DatasetSource
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
from data.shards import ShardWriter
from data.sources import TASK_BYTES, Source
from data.tasks import TASKS, finished_tasks, read_tokens, remove_task
from data.tokenizer import Tokenizer

_PARTS, _LOCK = "parts", ".lock"
_PART_SUMS = ("tokens", "documents", "null_rows", "eos_texts")
_MIN_VAL_DOCUMENTS = 10
_MIN_CUT_FRACTION = 0.1


@contextlib.contextmanager
def folder_lock(out: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises DataError if another process, or a rank on any machine, works there."""
    with _locked(out / _LOCK):
        for path in out.glob(f"{_LOCK}-*"):
            with _locked(path):
                pass
        yield


def rank_lock(out: Path, rank: int) -> contextlib.AbstractContextManager[None]:
    """Hold the lock of one rank of a cluster, which works while others do."""
    return _locked(out / f"{_LOCK}-{rank}")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = Lock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise DataError(f"another process is preparing {path.parent}; wait for it, or stop it first") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows cannot remove open files; filelock does it there
            path.unlink()
        lock.release()


def open_plan(plan: Manifest, source: Source, tokenizer: Tokenizer, out: Path) -> Manifest:
    """Write the plan into a new folder; return the plan of a started folder, or the manifest of a finished one."""
    old = read_manifest(out) or read_manifest(out, PREPARING)  # both: an interrupted repair, which begins again
    if old is None:
        if any(not entry.name.startswith(".") for entry in out.iterdir()):
            raise DataError(f"{out} already exists and has other content; remove it, or prepare into another folder")
        plan.inputs = _group(source.tasks())
        plan.source = {**plan.source, **source.provenance}
        plan.tokenizer = record_tokenizer(tokenizer, out)
        plan.write(out / PREPARING)
        return plan
    if isinstance(source, DatasetSource):  # the branch may have moved since
        source.commit = old.source.get("revision")
    if not old.shards and (old.source.get("errors"), plan.source.get("errors")) == ("strict", "replace"):
        old.source["errors"] = "replace"  # finished tasks had no error to replace
        old.write(out / PREPARING)
    what = f"{out} {'already exists' if old.shards else 'was started'} with"
    for key, value in _settings(plan).items():
        if (found := _settings(old).get(key)) != value:
            raise DataError(f"{what} {key} {found!r}, got {value!r}; use the same value, or remove the folder")
    if old.tokenizer.sha256 != tokenizer.sha256:
        raise DataError(
            f"{what} tokenizer {old.tokenizer.name!r}, got another one, {tokenizer.name!r}; use the same one, or "
            "remove the folder"
        )
    if not old.shards:
        _accept_changed_inputs(old, source, out)
    return old


def _settings(plan: Manifest) -> dict[str, Any]:
    names = ("val_fraction", "shard_tokens", "max_tokens")
    # Before 2026-12, manifests did not name the split of a Hub set, which was always this one.
    return {"split": "train"} | {name: getattr(plan, name) for name in names} | plan.source


def _group(tasks: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Join small tasks of a source to tasks of up to TASK_BYTES."""
    groups: list[list[dict[str, Any]]] = []
    size = 0
    for task in tasks:
        if not groups or size + task["bytes"] > TASK_BYTES or task.get("is_stream") or groups[-1][0].get("is_stream"):
            groups.append([])
            size = 0
        groups[-1].append(task)
        size += task["bytes"]
    return groups


def _accept_changed_inputs(plan: Manifest, source: Source, out: Path) -> None:
    """Accept changed files if their task is not finished: the user fixed them."""
    if _is_of_earlier_version(plan):
        raise DataError(f"an earlier version began {out}; remove the folder")
    inputs = _group(source.tasks())
    if inputs == plan.inputs:
        return
    paths = [[[task["path"] for task in group] for group in groups] for groups in (inputs, plan.inputs)]
    if paths[0] != paths[1]:
        raise DataError(f"{out} was started with other files; give the same ones, or remove the folder")
    for number in finished_entries(out):
        for new, old in zip(inputs[number], plan.inputs[number], strict=True):
            if new != old:
                raise DataError(f"{new['path']} has changed since it was tokenized for {out}; remove the folder")
    plan.inputs = inputs
    plan.write(out / PREPARING)


def _is_of_earlier_version(plan: Manifest) -> bool:
    """Return True if the plan has files instead of groups of tasks."""
    return any(isinstance(entry, dict) for entry in plan.inputs)


def part_records(out: Path) -> list[dict[str, Any]]:
    """Return the records of the finished parts, in order: {"part", "first", "last" (keys), sums, "shards"}."""
    paths = sorted((out / _PARTS).glob("*.json"))
    return [read_json_with_checksum(path, "remove it, and its part is made again") for path in paths]


def part_of(parts: Iterable[dict[str, Any]], key: str) -> dict[str, Any] | None:
    """Return the part that has a task."""
    return next((part for part in parts if part["first"] <= key <= part["last"]), None)


def finished_entries(out: Path) -> set[int]:
    """Return the numbers of the plan's entries that have finished tasks."""
    done = {entry_of(key) for key in finished_tasks(out)}
    return done.union(*(range(entry_of(part["first"]), entry_of(part["last"]) + 1) for part in part_records(out)))


def entry_of(key: str) -> int:
    """Return the number of the plan's entry that a task is from."""
    return int(key.partition(".")[0])


class Joiner:
    """Join tasks to the shards of parts, which threads of `executor` finish. Call `add` with every task, in order."""

    def __init__(self, plan: Manifest, out: Path, executor: Executor) -> None:
        assert plan.shard_tokens is not None and plan.val_fraction is not None
        self.plan, self.out, self._executor = plan, out, executor
        self.shard_tokens, self.val_fraction = plan.shard_tokens, plan.val_fraction
        self._vocabulary = plan.tokenizer.vocabulary
        self.parts = {record["part"]: record for record in part_records(out)}
        for key in finished_tasks(out):
            if part_of(self.parts.values(), key):  # an interruption left it
                remove_task(out, key)
        self.finished = {*finished_tasks(out)}
        """keys of the tasks that were done before, and are not in a part"""
        self._counted: set[int] = set()  # parts
        self._pending: list[dict[str, Any]] = []  # records of tasks that are not in a part yet
        self._documents = self._tokens = 0  # of all tasks so far

    @property
    def is_full(self) -> bool:
        """True when max_tokens are there."""
        return self.plan.max_tokens is not None and self._tokens >= self.plan.max_tokens

    def is_done(self, key: str) -> bool:
        """Return True if a task was done before, or is in a part."""
        return key in self.finished or part_of(self.parts.values(), key) is not None

    def add(self, key: str) -> int:
        """Add the next task, and return its number of tokens."""
        part = part_of(self.parts.values(), key)
        if part is None:
            path = self.out / TASKS / f"{key}.json"
            record = read_json_with_checksum(path, "remove it, and its task is done again")
            size = sum(pending["tokens"] for pending in self._pending)
            if size and size + record["tokens"] > self.shard_tokens and self._is_drawn():
                self._write_part()
            self._pending.append(record)
        elif part["part"] in self._counted:
            return 0
        else:  # all of a finished part, at its first task
            if self._pending:
                self._write_part()
            self._counted.add(part["part"])
            record = part
        self._tokens += record["tokens"]
        self._documents += record["documents"]
        return int(record["tokens"])

    def finish(self) -> None:
        """Write the last part."""
        if not self._is_drawn() and self.plan.val_from is None:
            total = min(self._tokens, self.plan.max_tokens or self._tokens)
            count = math.ceil(max(self.val_fraction, _MIN_CUT_FRACTION) * total)
            self.plan.val_from = total - count
            self.plan.split_rule = f"val is the end of the text, the last {count:,} of {total:,} tokens"
            self.plan.write(self.out / PREPARING)
        if self._pending:
            self._write_part()

    def _is_drawn(self) -> bool:
        """Return True if there are enough documents up to here to draw some for validation."""
        return bool(self._counted) or self._documents * self.val_fraction >= _MIN_VAL_DOCUMENTS

    def _write_part(self) -> None:
        number = next(number for number in range(len(self.parts) + 1) if number not in self.parts)
        records, self._pending = self._pending, []
        position = self._tokens - sum(record["tokens"] for record in records)  # of the part's first token
        writers = {split: self._writer(split, number) for split in SPLITS}
        try:
            for record in records:
                for tokens, documents in read_tokens(self.out, record, self._vocabulary.dtype):
                    self._write(writers, tokens, documents, position)
                    position += len(tokens)
            shards = [
                {"file": shard.pop("file"), "split": split, "part": number, **shard}
                for split in SPLITS
                for shard in writers[split].finish()
            ]
        finally:
            for writer in writers.values():
                writer.abandon()
        sums = {name: sum(record[name] for record in records) for name in _PART_SUMS}
        keys = {"first": records[0]["key"], "last": records[-1]["key"]}
        self.parts[number] = {"part": number, **keys, **sums, "shards": shards}
        (self.out / _PARTS).mkdir(exist_ok=True)
        write_json_with_checksum(self.out / _PARTS / f"{number:05d}.json", self.parts[number])
        self._counted.add(number)
        for record in records:
            remove_task(self.out, record["key"])

    def _write(
        self, writers: Mapping[str, ShardWriter], tokens: np.ndarray, documents: np.ndarray, position: int
    ) -> None:
        """Write a task's documents, up to max_tokens from the start of the text."""
        lengths, is_val = documents[:, 0], documents[:, 1].astype(bool)
        if self.plan.max_tokens is not None:
            keep = min(max(0, self.plan.max_tokens - position), len(tokens))
            lengths = _cut(lengths, keep)[0]
            tokens, is_val = tokens[:keep], is_val[: len(lengths)]
        if self.plan.val_from is None:
            for split, mask in (("val", is_val), ("train", ~is_val)):
                writers[split].add(tokens[np.repeat(mask, lengths)], lengths[mask])
        else:
            at = min(max(0, self.plan.val_from - position), len(tokens))
            before, after = _cut(lengths, at)
            writers["train"].add(tokens[:at], before)
            writers["val"].add(tokens[at:], after)

    def _writer(self, split: str, part: int) -> ShardWriter:
        prefix = f"{self.plan.name}_{split}_{part:05d}"
        for stale in [*self.out.glob(f"{glob.escape(prefix)}*"), *self.out.glob(f".{glob.escape(prefix)}*")]:
            stale.unlink()  # from an interrupted run
        tokens, vocabulary = self.shard_tokens, self._vocabulary
        return ShardWriter(self.out, prefix, shard_tokens=tokens, executor=self._executor, vocabulary=vocabulary)


def _cut(lengths: np.ndarray, at: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide documents at a token, which may be inside of one; return the lengths before and after it."""
    ends = np.cumsum(lengths)
    index = int(np.searchsorted(ends, at, side="right"))
    inside = at - (int(ends[index - 1]) if index else 0)
    before, after = lengths[:index], lengths[index:].copy()
    if inside:
        before = np.append(before, inside)
        after[0] -= inside
    return before, after


def finish(plan: Manifest, out: Path, before: Sequence[Mapping[str, Any]] = ()) -> Manifest:
    """Write the manifest of a folder whose parts are all there, and remove the rest.

    Raises DataError if a split is empty, or if a repaired folder does not have the shards that it had `before`.
    """
    parts = part_records(out)
    plan.shards = [shard for part in parts for shard in part.pop("shards")]
    plan.parts = parts
    for split in SPLITS:
        if not plan.total(split, "tokens"):
            for shard in plan.shards:
                (out / shard["file"]).unlink(missing_ok=True)
            remove_plan(out)
            raise DataError(f"the {split} split has no text (val_fraction {plan.val_fraction}): give more text")
    if before and plan.shards != before:
        (out / MANIFEST).unlink()
        remove_plan(out)
        raise DataError(
            f"{out} cannot be repaired: its source has changed, or the program that reads it; it has no manifest now: "
            "remove it, and prepare it again"
        )
    plan.write(out / MANIFEST)
    remove_plan(out)
    return plan


def reopen(manifest: Manifest, damaged: set[str], out: Path) -> Manifest:
    """Turn a finished folder into one whose parts with damaged shards are not made yet. Return its plan."""
    parts = {shard["part"] for shard in manifest.shards if shard["file"] in damaged}
    if not manifest.parts:
        raise DataError(f"an earlier version made {out}: prepare it again in another folder, or copy the shards again")
    plan = dataclasses.replace(manifest, shards=[])
    (out / _PARTS).mkdir(exist_ok=True)
    for part in manifest.parts:
        if part["part"] not in parts:
            shards = [shard for shard in manifest.shards if shard["part"] == part["part"]]
            write_json_with_checksum(out / _PARTS / f"{part['part']:05d}.json", {**part, "shards": shards})
    plan.write(out / PREPARING)  # last: with it, the parts that are not recorded are made again
    return plan


def remove_plan(out: Path) -> None:
    """Remove what only a preparation needs."""
    for name in (_PARTS, TASKS):
        shutil.rmtree(out / name, ignore_errors=True)
    (out / PREPARING).unlink(missing_ok=True)


def kept_work(out: str | Path) -> str:
    """Return the end of an error message: the finished tasks that the next run keeps."""
    out = Path(out)
    with contextlib.suppress(DataError, OSError):
        plan = read_manifest(out, PREPARING)
        if plan is not None and not _is_of_earlier_version(plan) and (done := finished_entries(out)):
            return f". {len(done)} of {len(plan.inputs)} tasks are kept in {out}: run the same command to resume"
    return ""
