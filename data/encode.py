"""Records to tokens, over several processes, in the records' order."""

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
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import DataError
from data.sources import document
from data.tokenizer import check_engine, encode_document, load_encoder

# Records go to the processes in batches of about this many bytes: large against the cost of sending them, small
# against the memory of a machine.
_BATCH_BYTES = 1_000_000


class Encoded(NamedTuple):
    """A batch of documents."""

    tokens: np.ndarray
    """[N] uint16, each document led by EOT"""
    lengths: np.ndarray
    """[D] int64, tokens in each document"""
    is_val: np.ndarray
    """[D] bool, whether it is for validation"""


class Encoder:
    """
    Tokenises records and deals them to the splits. A document goes to validation by a hash of its text, so exact
    duplicates never stand on both sides. What comes out does not depend on the number of processes.

    Use it in a `with`: it keeps its processes from one call to the next.
    """

    def __init__(self, *, num_proc, val_fraction, text_column="text", errors="strict", engine="tiktoken"):
        """
        Args:
            num_proc: processes; 1 works in this one.
            val_fraction: share of the documents that become validation.
            text_column, errors: see data.sources.document.
            engine: see data.tokenizer.load_encoder.

        Raises:
            DataError: the engine or the vocabulary is missing.
        """
        self._options = (val_fraction, text_column, errors, engine)
        self._num_proc, self._pool = num_proc, None
        self._folder, self._numbers = None, itertools.count()
        check_engine(engine)  # what is missing is said here, once, and not by each process

    def __enter__(self):
        if self._num_proc > 1:
            # Results come in files. Through the pipe that the processes share, they would come in pieces: a process
            # that is killed in the middle of one would leave the others, and this one, waiting for ever for the rest.
            self._folder = tempfile.TemporaryDirectory(prefix="gpt2-repro-", ignore_cleanup_errors=True)
            # spawn: the same on every platform, and no fork of a process that has threads.
            self._pool = ProcessPoolExecutor(
                self._num_proc,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=[self._options[-1], self._folder.name],
            )
        return self

    def __exit__(self, *error):
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._folder.cleanup()

    def encode(self, records):
        """
        Args:
            records: iterable of data.sources.Record.

        Yields:
            Encoded, batch by batch.

        Raises:
            DataError: a record without text, a process that was killed.
        """
        batches = _batches(records)
        if self._pool is None:
            for batch in batches:
                yield _encode_batch(batch, *self._options)
            return
        pending = deque()
        try:
            # A few batches ahead of the processes, so that memory stays flat however long the source is.
            for batch in itertools.chain(batches, [None]):
                if batch is not None:
                    path = Path(self._folder.name) / str(next(self._numbers))
                    with _interrupts_held():  # a submit may start a process
                        pending.append((path, self._pool.submit(_encode_to_file, path, batch, *self._options)))
                while pending and (batch is None or len(pending) > 3 * self._num_proc or pending[0][1].done()):
                    path, future = pending.popleft()
                    future.result()
                    yield _read(path)
        except BrokenProcessPool as error:
            raise DataError(
                "a tokenising process was killed, as a rule for want of memory; try again with a smaller --num_proc"
            ) from error
        finally:
            for _, future in pending:
                future.cancel()


@contextlib.contextmanager
def _interrupts_held():
    """
    Starts workers that Ctrl-C does not touch: a process takes over its parent's blocked signals.

    A terminal sends Ctrl-C to all processes. It is the parent's to answer: a worker that dies of it may hold the lock
    of the queue, and then the others wait for ever. Windows cannot block signals; there, `_start_worker` has to do.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)  # one that came meanwhile arrives now


def _start_worker(engine, folder):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    load_encoder(engine)
    threading.Thread(target=_end_with_parent, args=[folder], daemon=True).start()


def _end_with_parent(folder):
    """A worker whose parent was killed would wait for work for ever, and the folder for somebody to clear it up."""
    wait([multiprocessing.parent_process().sentinel])
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _batches(records):
    batch, size = [], 0
    for record in records:
        batch.append(record)
        size += len(record.content)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_to_file(path, batch, *options):
    encoded = _encode_batch(batch, *options)
    try:
        with path.open("wb") as file:
            for array in encoded:
                np.save(file, array)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _read(path):
    with path.open("rb") as file:
        encoded = Encoded(*(np.load(file) for _ in Encoded._fields))
    path.unlink()
    return encoded


def _encode_batch(batch, val_fraction, text_column, errors, engine):
    documents, is_val = [], []
    for record in batch:
        text = document(record, text_column=text_column, errors=errors)
        if text and not text.isspace():
            # A record that is not JSON is its text already, unless bytes of it were replaced.
            content = record.content if errors == "strict" and not record.is_json else text.encode()
            is_val.append(_share(content) < val_fraction)
            documents.append(encode_document(text, engine))
    lengths = np.array([len(tokens) for tokens in documents], dtype=np.int64)
    tokens = np.concatenate(documents) if documents else np.zeros(0, dtype=np.uint16)
    return Encoded(tokens, lengths, np.array(is_val, dtype=bool))


def _share(content):
    """A number in [0, 1) that is the same for the same text."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") / 2**64


SPLIT_RULE = "val where blake2b-8 of the UTF-8 text, over 2**64, is below val_fraction"
