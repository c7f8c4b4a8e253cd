"""Tokenize records with several processes, in the order of the records."""

import contextlib
import hashlib
import itertools
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
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
            val_fraction: fraction of the documents that go to validation.
            text_column: see data.sources.decode_record, as for `errors`.
        """
        self._options = (val_fraction, text_column, errors, tokenizer_backend)
        self._num_proc, self._numbers = num_proc, itertools.count()
        self._pool: ProcessPoolExecutor | None = None
        self._folder = Path()  # of the workers' results
        check_backend(tokenizer_backend)  # one error here instead of one in each process

    def __enter__(self) -> Self:
        if self._num_proc > 1:
            # Workers return results in files. A worker killed in the middle of a write to the pipe that all workers
            # share would leave the other workers and this process waiting forever for the rest.
            self._folder = Path(tempfile.mkdtemp(prefix="gpt2-repro-"))
            # spawn works on every platform, and forking a process that has threads is not safe.
            self._pool = ProcessPoolExecutor(
                self._num_proc,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(self._options[-1], self._folder),
            )
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            shutil.rmtree(self._folder, ignore_errors=True)

    def encode(self, records: Iterable[Record]) -> Generator[Encoded, None, None]:
        """Tokenize records in batches. Raises UserError for a record without text, or if a worker was killed."""
        if self._pool is None:
            yield from (_encode_batch(batch, *self._options) for batch in _batches(records))
            return
        pending: deque[tuple[Path, Future[None]]] = deque()
        try:
            # Read only a few batches ahead of the workers, so that memory does not grow with the source.
            for batch in itertools.chain(_batches(records), [None]):
                if batch is not None:
                    path = self._folder / str(next(self._numbers))
                    with _block_interrupts():  # submit may start a process
                        pending.append((path, self._pool.submit(_encode_to_file, path, batch, *self._options)))
                while pending and (batch is None or len(pending) > 3 * self._num_proc or pending[0][1].done()):
                    path, future = pending.popleft()
                    future.result()
                    yield _read(path)
        except BrokenProcessPool as error:
            raise DataError(
                "a tokenizer process was killed (usually out of memory); try again with a smaller --num_proc"
            ) from error
        finally:
            for _, future in pending:
                future.cancel()


@contextlib.contextmanager
def _block_interrupts() -> Iterator[None]:
    """Block SIGINT while workers start: a process inherits its parent's blocked signals.

    A terminal sends Ctrl-C to all processes, and only the parent may handle it. A worker that ends on Ctrl-C may hold
    the lock of the queue, and then the other workers wait forever. Windows cannot block signals; only `_start_worker`
    protects the workers there.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)  # a pending SIGINT arrives now


def _start_worker(tokenizer_backend: str, folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    load_encoder(tokenizer_backend)
    threading.Thread(target=_exit_with_parent, args=[folder], daemon=True).start()


def _exit_with_parent(folder: Path) -> None:
    """Remove the folder of results and exit when the parent was killed; the worker would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


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


def _encode_to_file(path: Path, batch: list[Record], *options: Any) -> None:
    encoded = _encode_batch(batch, *options)
    try:
        with path.open("wb") as file:
            for array in encoded:
                np.save(file, array)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


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
            is_val.append(_hash_fraction(content) < val_fraction)
            documents.append(encode_document(text, tokenizer_backend))
    lengths = np.array([len(tokens) for tokens in documents], dtype=np.int64)
    tokens = np.concatenate(documents) if documents else np.zeros(0, dtype=np.uint16)
    return Encoded(tokens, lengths, np.array(is_val, dtype=bool))


def _hash_fraction(content: bytes) -> float:
    """Hash the text to a number in [0, 1)."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") / 2**64
