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
from data.tokenizer import check_backend, encode_document, load_encoder

SPLIT_RULE = "val where blake2b-8 of the UTF-8 text, over 2**64, is below val_fraction"

# Bytes in a batch of records: enough to make the cost of sending it negligible, little enough for memory.
_BATCH_BYTES = 1_000_000


class Encoded(NamedTuple):
    """A batch of documents."""

    tokens: np.ndarray
    """[N] uint16; each document begins with EOT"""
    lengths: np.ndarray
    """[D] int64, tokens in each document"""
    is_val: np.ndarray
    """[D] bool, True for a validation document"""


class Encoder:
    """Tokenize records and split them into train and val.

    A hash of its text decides the split of a document, so exact duplicates are always in the same split. The result
    does not depend on the number of processes, which live until the end of the `with` block.
    """

    def __init__(
        self,
        *,
        num_proc: int,
        val_fraction: float,
        text_column: str = "text",
        errors: str = "strict",
        tokenizer_backend: str = "tiktoken",
    ) -> None:
        """Check the tokenizer backend; `__enter__` starts the processes.

        Args:
            num_proc: worker processes; 1 tokenizes in the current process.
            text_column: see data.sources.decode_record, as for `errors`.
        """
        self._options = (val_fraction, text_column, errors, tokenizer_backend)
        self._num_proc = num_proc
        self._pool: ProcessPoolExecutor | None = None
        self._stack = contextlib.ExitStack()
        check_backend(tokenizer_backend)  # one error here instead of one in each process

    def __enter__(self) -> Self:
        if self._num_proc > 1:
            # Workers return results in files. A worker killed in the middle of a write to the pipe that all workers
            # share would leave the other workers and this process waiting forever for the rest.
            folder = tempfile.TemporaryDirectory(prefix="gpt2-repro-", ignore_cleanup_errors=True)
            self._folder = Path(self._stack.enter_context(folder))
            # spawn works on every platform, and forking a process that has threads is not safe.
            context = multiprocessing.get_context("spawn")
            pipe, open_end = context.Pipe(duplex=False)
            arguments = (self._options[-1], self._folder, pipe)
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
            yield from (_encode_batch(batch, *self._options) for batch in _batches(records))
            return
        pending: deque[Future[Path]] = deque()
        try:
            for batch in _batches(records):
                with _delay_interrupts():  # submit may start a process
                    pending.append(self._pool.submit(_encode_to_file, self._folder, batch, *self._options))
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


def _start_worker(tokenizer_backend: str, folder: Path, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for Windows
    threading.Thread(target=_exit_when_closed, args=[folder, pipe], daemon=True).start()
    load_encoder(tokenizer_backend)


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


def _encode_to_file(folder: Path, batch: list[Record], *options: Any) -> Path:
    encoded = _encode_batch(batch, *options)
    descriptor, path = tempfile.mkstemp(dir=folder)
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


def _encode_batch(
    batch: list[Record], val_fraction: float, text_column: str, errors: str, tokenizer_backend: str
) -> Encoded:
    documents, is_val = [], []
    for record in batch:
        text = decode_record(record, text_column=text_column, errors=errors)
        if text and not text.isspace():
            # The content of a record that is not JSON is its text, unless some bytes were replaced.
            content = record.content if errors == "strict" and not record.is_json else text.encode()
            hashed = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
            is_val.append(hashed / 2**64 < val_fraction)
            documents.append(encode_document(text, tokenizer_backend))
    lengths = np.array([len(tokens) for tokens in documents], dtype=np.int64)
    tokens = np.concatenate(documents) if documents else np.zeros(0, dtype=np.uint16)
    return Encoded(tokens, lengths, np.array(is_val, dtype=bool))
