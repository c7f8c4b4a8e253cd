"""Tokenize records with several processes, in the order of the records."""

import contextlib
import hashlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from data import DataError
from data.sources import Record, decode_record
from data.tokenizer import Tokenizer

SPLIT_RULE = "val where blake2b-8 of the UTF-8 text, over 2**64, is below val_fraction"

# Bytes in a batch of records: enough to make the cost of sending it negligible, little enough for memory.
_BATCH_BYTES = 1_000_000


class EncodeOptions(NamedTuple):
    """Everything that decides the tokens of a record."""

    tokenizer: Tokenizer
    val_fraction: float
    text_column: str = "text"
    errors: str = "strict"
    """see data.sources.decode_record, as for text_column"""
    parse_eos: bool = False
    """the eos token's text, written in a document, separates documents; otherwise it is plain characters"""


class Encoded(NamedTuple):
    """A batch of documents."""

    tokens: np.ndarray
    """[N] of the tokenizer's type; each document begins with the eos token"""
    lengths: np.ndarray
    """[D] int64, tokens in each document"""
    is_val: np.ndarray
    """[D] bool, True for a validation document"""
    null_rows: np.ndarray
    """[] int64, records without a text, which were left out"""
    eos_texts: np.ndarray
    """[] int64, occurrences of the eos token's text, <|endoftext|> for GPT-2's"""


class Encoder:
    """Tokenize records and split them into train and val.

    A hash of its text decides the split of a document, so exact duplicates are always in the same split. The result
    does not depend on the number of processes, which live until the end of the `with` block.
    """

    def __init__(self, options: EncodeOptions, *, num_proc: int) -> None:
        """Keep the options; `__enter__` starts the processes (with num_proc=1, none)."""
        self._options, self._num_proc = options, num_proc
        self._pool: ProcessPoolExecutor | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if self._num_proc > 1:
            # Workers return results in files. A worker killed in the middle of a write to the pipe that all workers
            # share would leave the other workers and this process waiting forever for the rest.
            folder = tempfile.TemporaryDirectory(prefix="gpt2-repro-", ignore_cleanup_errors=True)
            self._folder = Path(self._stack.enter_context(folder))
            # spawn works on every platform, and forking a process that has threads is not safe.
            context = multiprocessing.get_context("spawn")
            pipe, open_end = context.Pipe(duplex=False)
            arguments = (self._options, self._folder, pipe)
            self._pool = ProcessPoolExecutor(self._num_proc, context, _start_worker, arguments)
            if sys.version_info < (3, 11, 5):  # shutdown would wait forever for the thread that sends to ended workers
                self._pool._call_queue.cancel_join_thread()  # type: ignore[attr-defined]
            self._stack.callback(self._pool.shutdown)
            self._stack.enter_context(open_end)  # closed first: _exit_when_closed ends the workers
        return self

    def __exit__(self, *error: object) -> None:
        with _delay_interrupts():  # a second Ctrl-C
            self._stack.close()

    def encode(self, records: Iterable[Record]) -> Generator[Encoded, None, None]:
        """Tokenize records in batches. Raises UserError for a record without text, or if a worker was killed."""
        if self._pool is None:
            yield from (_encode_batch(batch, self._options) for batch in _batches(records))
            return
        pending: deque[Future[Path]] = deque()
        try:
            for batch in _batches(records):
                with _delay_interrupts():  # submit may start a process
                    pending.append(self._pool.submit(_encode_to_file, batch))
                # Read only a few batches ahead of the workers, so that memory does not grow with the source.
                while len(pending) > 3 * self._num_proc or (pending and pending[0].done()):
                    yield _read(pending.popleft().result())
            while pending:
                yield _read(pending.popleft().result())
        except BrokenProcessPool as error:
            raise DataError(
                "a tokenizer process was killed (usually out of memory); try again with a smaller --num_proc"
            ) from error


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


_worker: dict[str, Any] = {}  # in a worker: its options and the folder for results


def _start_worker(options: EncodeOptions, folder: Path, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for Windows
    threading.Thread(target=_exit_when_closed, args=[folder, pipe], daemon=True).start()
    _worker.update(options=options, folder=folder)
    options.tokenizer.encode("")  # loads it


def _exit_when_closed(folder: Path, pipe: Connection) -> None:
    """Exit, also in the middle of a batch, when the parent has closed its end of the pipe or was killed."""
    wait([pipe])
    shutil.rmtree(folder, ignore_errors=True)  # a killed parent cannot remove it
    os._exit(0)


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.content)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_to_file(batch: list[Record]) -> Path:
    encoded = _encode_batch(batch, _worker["options"])
    descriptor, path = tempfile.mkstemp(dir=_worker["folder"])
    try:
        with os.fdopen(descriptor, "wb") as file:
            for array in encoded:
                np.save(file, array)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
    return Path(path)


def _read(path: Path) -> Encoded:
    with path.open("rb") as file:
        encoded = Encoded(*(np.load(file) for _ in Encoded._fields))
    path.unlink()
    return encoded


def _encode_batch(batch: list[Record], options: EncodeOptions) -> Encoded:
    tokenizer, val_fraction, text_column, errors, parse_eos = options
    documents, is_val, null_rows, eos_texts = [], [], 0, 0
    for record in batch:
        text = decode_record(record, text_column=text_column, errors=errors)
        if text is None:
            null_rows += 1
            continue
        eos_texts += text.count(tokenizer.eos_text)
        for part in text.split(tokenizer.eos_text) if parse_eos else [text]:
            if part and not part.isspace():
                hashed = int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "big")
                is_val.append(hashed / 2**64 < val_fraction)
                documents.append(tokenizer.encode_document(part))
    lengths = np.array([len(tokens) for tokens in documents], dtype=np.int64)
    tokens = np.concatenate(documents) if documents else np.zeros(0, dtype=tokenizer.dtype)
    return Encoded(tokens, lengths, np.array(is_val, dtype=bool), np.array(null_rows), np.array(eos_texts))
