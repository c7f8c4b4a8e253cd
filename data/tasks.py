"""Tokenize tasks in this process or in several; one process does all of a task.

A task's result is three files in DIR/tasks: KEY.bin has the tokens, KEY.npy [D, 2] int64 the number of tokens of each
document and whether it was drawn for validation, and KEY.json, written last, is the record. A worker returns only its
key, since one that is killed in the middle of a long message would leave the others and this process waiting.
"""

import contextlib
import hashlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.files import replace_file
from data import DataError
from data.manifest import write_json_with_checksum
from data.sources import FileSource, Source
from data.tokenizer import Tokenizer

SPLIT_RULE = "val where blake2b-8 of the UTF-8 text, over 2**64, is below val_fraction"
TASKS = "tasks"
_CHUNK_TOKENS = 4_000_000


class Work(NamedTuple):
    """Settings that all tasks of a preparation share."""

    source: Source
    tokenizer: Tokenizer
    out: Path
    val_fraction: float
    parse_eos: bool
    """the eos token's text, written in a document, separates documents; otherwise it is plain characters"""


class Task(NamedTuple):
    """One task, or a piece of a large compressed file."""

    key: str
    """"000012", or "000012.00003" for a piece of task 12; keys sort in the order of the documents"""
    inputs: Sequence[Mapping[str, Any]]
    """tasks of the source, done one after the other; a piece has its content with it"""


def tasks_of(source: Source, number: int, inputs: Sequence[Mapping[str, Any]]) -> Iterator[Task]:
    """Yield the tasks of one entry of the plan."""
    if not inputs[0].get("is_stream"):
        yield Task(f"{number:06d}", inputs)
        return
    assert isinstance(source, FileSource)
    for index, piece in enumerate(source.stream(inputs[0])):
        yield Task(f"{number:06d}.{index:05d}", [{**inputs[0], "piece_content": piece}])


def run_task(work: Work, task: Task) -> str:
    """Tokenize a task, write its files, and return its key."""
    folder = work.out / TASKS
    folder.mkdir(parents=True, exist_ok=True)
    counts = {"null_rows": 0, "eos_texts": 0}
    lengths: list[tuple[int, bool]] = []
    crc32 = 0
    partial = folder / f".{task.key}.bin.partial"
    with partial.open("wb") as file:
        for text, starts in _texts(work, task, counts):
            tokens = work.tokenizer.encode_document(text, starts)
            digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
            lengths.append((len(tokens), int.from_bytes(digest, "big") / 2**64 < work.val_fraction))
            crc32 = zlib.crc32(tokens.data, crc32)
            file.write(tokens.data)
    replace_file(partial, folder / f"{task.key}.bin")
    documents = np.array(lengths, dtype=np.int64).reshape(-1, 2)
    np.save(folder / f"{task.key}.npy", documents)
    num_tokens = int(documents[:, 0].sum())
    record = {"key": task.key, "tokens": num_tokens, "documents": len(documents), "crc32": crc32, **counts}
    write_json_with_checksum(folder / f"{task.key}.json", record)
    return task.key


def _texts(work: Work, task: Task, counts: dict[str, int]) -> Iterator[tuple[str, bool]]:
    """Yield (text, whether a document starts with it)."""
    for document in itertools.chain.from_iterable(map(work.source.documents, task.inputs)):
        if document.text is None:
            counts["null_rows"] += 1
            continue
        parts = [document.text]
        if work.tokenizer.eos_text in document.text:
            counts["eos_texts"] += document.text.count(work.tokenizer.eos_text)
            parts = document.text.split(work.tokenizer.eos_text) if work.parse_eos else parts
        for index, text in enumerate(parts):
            if text and not text.isspace():
                yield text, document.starts or index > 0


def read_tokens(out: Path, record: Mapping[str, Any], dtype: np.dtype) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield a finished task's tokens, [N], and its documents, [D, 2] (see the top of this file), some at a time.

    Raises:
        DataError: they are not those that were written; known at the end only.
    """
    path, crc32 = out / TASKS / record["key"], 0
    remedy = f"remove {path}.json, and its task is done again"
    try:
        documents = np.load(path.with_name(f"{path.name}.npy"), allow_pickle=False)
        chunks = np.cumsum(documents[:, 0]) // _CHUNK_TOKENS
        with path.with_name(f"{path.name}.bin").open("rb") as file:
            for part in np.split(documents, np.flatnonzero(np.diff(chunks)) + 1):
                content = file.read(int(part[:, 0].sum()) * dtype.itemsize)
                crc32 = zlib.crc32(content, crc32)
                yield np.frombuffer(content, dtype=dtype), part
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: {error}; {remedy}") from error
    if crc32 != record["crc32"]:
        raise DataError(f"{path}.bin is damaged; {remedy}")


def finished_tasks(out: Path) -> list[str]:
    """Return the keys of the finished tasks whose tokens are still in DIR/tasks, in order."""
    return sorted(path.stem for path in (out / TASKS).glob("*.json"))


def remove_task(out: Path, key: str) -> None:
    """Remove a task's files: the record first, so that it never names files that are gone."""
    for suffix in (".json", ".bin", ".npy"):
        (out / TASKS / f"{key}{suffix}").unlink(missing_ok=True)


class Workers(contextlib.ExitStack):
    """Processes that run tasks; with num_proc=1, this process. They live until the end of the `with` block."""

    def __init__(self, work: Work, *, num_proc: int) -> None:
        super().__init__()
        self._work, self._num_proc = work, num_proc
        self._pool: ProcessPoolExecutor | None = None
        if num_proc > 1:
            # spawn works on every platform, and forking a process that has threads is not safe.
            context = multiprocessing.get_context("spawn")
            pipe, open_end = context.Pipe(duplex=False)
            self._pool = ProcessPoolExecutor(num_proc, context, _start_worker, (work, pipe))
            if sys.version_info < (3, 11, 5):  # shutdown would wait forever for the thread that sends to ended workers
                self._pool._call_queue.cancel_join_thread()  # type: ignore[attr-defined]
            self.callback(self._pool.shutdown)
            self.enter_context(open_end)  # closed first: _exit_when_closed ends the workers

    def __exit__(self, *error: Any) -> bool | None:
        with _delay_interrupts():  # a second Ctrl-C
            return super().__exit__(*error)

    def run(self, tasks: Iterable[Task], is_done: Callable[[str], bool]) -> Generator[str, None, None]:
        """Run the tasks that are not done, and yield the keys of all, in order. Raises DataError if one is killed."""
        if self._pool is None:
            yield from (task.key if is_done(task.key) else run_task(self._work, task) for task in tasks)
            return
        pending: deque[Future[str]] = deque()
        try:
            for task in tasks:
                if is_done(task.key):
                    pending.append(Future())
                    pending[-1].set_result(task.key)
                else:
                    with _delay_interrupts(), _hidden_main():  # submit may start a process
                        pending.append(self._pool.submit(_run_task, task))
                # A piece of a compressed file is in memory until it is tokenized: read only a few ahead.
                limit = self._num_proc + 1 if "piece_content" in task.inputs[0] else 4 * self._num_proc
                while len(pending) > limit or (pending and pending[0].done()):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "a tokenizer process was killed (usually out of memory); try again with a smaller --num_proc"
            ) from error


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    """Keep new processes from importing the main program: train.py would import torch in each."""
    main = vars(sys.modules["__main__"])
    path = main.pop("__file__", None)
    try:
        yield
    finally:
        if path is not None:
            main["__file__"] = path


@contextlib.contextmanager
def _delay_interrupts() -> Iterator[None]:
    """Delay Ctrl-C while workers start or end, and start them with Ctrl-C and SIGTERM blocked.

    A terminal or a scheduler sends these signals to all processes, and only the parent may handle them; see
    `_exit_when_closed`. Windows cannot block signals.
    """
    received: list[int] = []
    mask = handler = None
    if threading.current_thread() is threading.main_thread():  # otherwise Python handles the signals elsewhere
        handler = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    if hasattr(signal, "pthread_sigmask"):
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        if received:
            signal.raise_signal(signal.SIGINT)


_worker: dict[str, Work] = {}  # in a worker process


def _start_worker(work: Work, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for Windows
    threading.Thread(target=_exit_when_closed, args=[pipe], daemon=True).start()
    _worker["work"] = work
    work.tokenizer.encode("")  # loads it


def _exit_when_closed(pipe: Connection) -> None:
    """Exit, also in the middle of a task, when the parent has closed its end of the pipe or was killed."""
    wait([pipe])
    os._exit(0)


def _run_task(task: Task) -> str:
    return run_task(_worker["work"], task)
