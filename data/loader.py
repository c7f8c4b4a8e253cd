"""
Batches of windows. Window w of a shard is its tokens [w T, w T + T], T + 1 of them: T inputs and the T tokens that
follow each. Which windows a step trains on is a pure function of (seed, step):

    stream    permutation of all windows by (seed, epoch 0), then by (seed, epoch 1), ...
    step s    the stream's positions s B ... s B + B - 1, for a global batch of B windows
    rank r    of W processes takes rows r B/W ... (r + 1) B/W - 1 of them

So each window comes once an epoch, any step can be asked for at once, and neither the number of processes nor a
crash changes what is trained on.
"""

import hashlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from data import DataError
from data.tokenizer import EOT

ORDERS = ("shuffled", "sequential", "lecture")
BOUNDARIES = ("ignore", "document")
_LECTURE_GPUS = 8
_ROUNDS = 8
_STEPS_AHEAD = 2


class Batch(NamedTuple):
    """Rows for a model."""

    inputs: torch.Tensor
    """[rows, T] int64"""
    targets: torch.Tensor
    """[rows, T] int64: the token after each input"""
    position_ids: torch.Tensor | None
    """[rows, T] int64, 0 where a document begins; None where documents are not kept apart"""

    def split(self, rows):
        """Batches of so many rows each."""
        parts = [[None] * len(self.inputs) if x is None else x.split(rows) for x in self]
        return [Batch(*part) for part in zip(*parts, strict=False)]

    def map(self, function):
        """A Batch of what the function makes of each tensor."""
        return Batch(*(None if x is None else function(x) for x in self))


class Permutation:
    """
    A permutation of 0 ... size - 1 that looks up any place without making the others: a Feistel network over the next
    power of four, whose results beyond the size go round again ("cycle walking"; Black and Rogaway, Ciphers with
    Arbitrary Finite Domains, 2002). A shuffled list of 10 billion tokens' windows is 80 MB a process and half a second
    an epoch; this is neither, and is the same in every version of NumPy.
    """

    def __init__(self, size, key):
        """
        Args:
            size: above 0.
            key: a str; another one gives another permutation.
        """
        self.size = size
        self._half_bits = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, places):
        """
        Args:
            places: [N] int array.

        Returns:
            [N] int64: what stands at these places.
        """
        found = self._encipher(np.asarray(places, dtype=np.uint64))
        while (outside := found >= self.size).any():
            found[outside] = self._encipher(found[outside])
        return found.astype(np.int64)

    def _encipher(self, x):
        left, right = x >> self._half_bits, x & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half_bits) | right


def _mix(x):
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): every bit of uint64 x sways every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class _Windows:
    """All windows of some shards under one numbering."""

    def __init__(self, shards, seq_len):
        self.shards, self.seq_len = shards, seq_len
        counts = [max(0, (len(shard) - 1) // seq_len) for shard in shards]
        self.starts = np.cumsum([0, *counts])  # first window of each shard

    def __len__(self):
        return int(self.starts[-1])

    def locate(self, indices):
        """([N] numbers of the shards, [N] first tokens in them) of these windows."""
        numbers = np.searchsorted(self.starts, indices, side="right") - 1
        return numbers, (indices - self.starts[numbers]) * self.seq_len

    def read(self, indices, boundary):
        """Batch of len(indices) rows."""
        T = self.seq_len
        numbers, begins = self.locate(indices)
        rows = np.empty((len(indices), T + 1), dtype=np.uint16)
        for row, number, begin in zip(rows, numbers.tolist(), begins.tolist(), strict=True):
            row[:] = self.shards[number][begin : begin + T + 1]
        # NumPy and not torch: in the reading thread, torch would start threads of its own for each operation.
        tokens = rows.astype(np.int64)
        parts = [tokens[:, :-1], tokens[:, 1:], _positions(rows[:, :-1]) if boundary == "document" else None]
        return Batch(*(None if part is None else torch.from_numpy(np.ascontiguousarray(part)) for part in parts))


def _positions(inputs):
    """Places in their documents, [rows, T]; a window that begins within a document counts from its own beginning."""
    place = np.arange(inputs.shape[1])
    begin = np.maximum.accumulate(np.where(inputs == EOT, place, 0), axis=1)
    return place - begin


class WindowLoader:
    """The training batches of one process; see the head of this file."""

    def __init__(self, shards, *, seq_len, batch_size, seed, order="shuffled", boundary="ignore", rank=0, world_size=1):
        """
        Args:
            shards: list of data.shards.Shard, as `data.manifest.open_split` gives them.
            seq_len: T, tokens in a training sequence.
            batch_size: B, windows in a step over all processes.
            seed: of the order.
            order: "shuffled"; "sequential": as the windows lie in the shards, every epoch alike; or "lecture": see
                `_lecture_batch`.
            boundary: "ignore" documents in a window, or "document": position ids begin again with each.
            rank, world_size: this process and how many there are.

        Raises:
            DataError: too little data for a window, a batch that the processes cannot share evenly, an order or
                boundary that does not exist.
        """
        if batch_size % world_size:
            raise DataError(f"a batch of {batch_size} windows cannot be shared evenly by {world_size} processes")
        for name, value, known in (("order", order, ORDERS), ("boundary", boundary, BOUNDARIES)):
            if value not in known:
                raise DataError(f"{name} {value!r} is none of {', '.join(known)}")
        self.windows = _Windows(shards, seq_len)
        if not len(self.windows):
            raise DataError(
                f"{sum(len(shard) for shard in shards):,} training tokens in {len(shards)} shard(s) hold no window of "
                f"{seq_len} + 1 tokens; give more text or a shorter batch.seq_len"
            )
        if order == "lecture":
            tokens, too_short = (
                batch_size * seq_len,
                [shard for shard in shards if len(shard) < 2 * batch_size * seq_len],
            )
            if batch_size % _LECTURE_GPUS or too_short:
                raise DataError(
                    f"order 'lecture' takes batches of {_LECTURE_GPUS} equal parts and shards of two batches or more: "
                    f"a batch has {batch_size} windows, {tokens:,} tokens, and {len(too_short)} shard(s) are shorter "
                    "than two; take order 'sequential'"
                )
        self.batch_size, self.seed, self.order, self.boundary = batch_size, seed, order, boundary
        self.rank, self.world_size = rank, world_size

    @property
    def num_windows(self):
        """Windows in an epoch."""
        return len(self.windows)

    @property
    def tokens_per_epoch(self):
        """Tokens trained on in an epoch."""
        return len(self.windows) * self.windows.seq_len

    def global_batch(self, step):
        """Window numbers of a step, [B] int64, the same on every process."""
        if self.order == "lecture":
            return self._lecture_batch(step)
        epochs, places = np.divmod(np.arange(step * self.batch_size, (step + 1) * self.batch_size), len(self.windows))
        if self.order == "shuffled":
            for epoch in np.unique(epochs):
                permutation = Permutation(len(self.windows), f"seed {self.seed}, epoch {epoch}")
                places[epochs == epoch] = permutation(places[epochs == epoch])
        return places

    def _lecture_batch(self, step):
        """
        What the lecture's 8 GPUs read (DataLoaderLite of build-nanogpt's train_gpt2.py), whatever trains here.

        GPU g begins a shard at the g-th eighth of its first B T tokens and goes on in leaps of B T, as long as one more
        leap and a token fit behind the place it comes to. So the last GPUs leave a shard a step before the first ones,
        and are one more step ahead of them after each such shard.
        """
        rows = self.batch_size // _LECTURE_GPUS
        parts = []
        for gpu in range(_LECTURE_GPUS):
            stretches = [
                (len(shard) - 1 - gpu * rows * self.windows.seq_len) // (self.batch_size * self.windows.seq_len)
                for shard in self.windows.shards
            ]
            ends = np.cumsum(stretches)
            place = step % ends[-1]
            shard = np.searchsorted(ends, place, side="right")
            stretch = place - (ends[shard] - stretches[shard])
            first = self.windows.starts[shard] + stretch * self.batch_size + gpu * rows
            parts.append(np.arange(first, first + rows))
        return np.concatenate(parts)

    def places(self, step):
        """
        Where this process's rows of a step come from.

        Returns:
            list of {"shard": file name, "first_token": its place among the shard's tokens}, a row each.
        """
        numbers, begins = self.windows.locate(self._mine(step))
        names = [shard.path and shard.path.name for shard in self.windows.shards]
        return [
            {"shard": names[number], "first_token": begin}
            for number, begin in zip(numbers.tolist(), begins.tolist(), strict=True)
        ]

    def _mine(self, step):
        rows = self.batch_size // self.world_size
        return self.global_batch(step)[self.rank * rows : (self.rank + 1) * rows]

    def batch(self, step):
        """
        Args:
            step: optimizer steps taken so far; 0 for the first batch.

        Returns:
            Batch of this process's B / world_size rows.

        Raises:
            DataError: a token that is not the one that was written, or that GPT-2 does not have.
        """
        return self.windows.read(self._mine(step), self.boundary)

    def batches(self, first_step, last_step, *, pin_memory=False):
        """
        The same, read ahead by a thread of its own.

        Args:
            first_step, last_step: the first step, and the one to stop before.
            pin_memory: put batches where a GPU copies from without waiting.

        Yields:
            Batch of each step.
        """

        def read(step):
            batch = self.batch(step)
            return batch.map(torch.Tensor.pin_memory) if pin_memory else batch

        with ThreadPoolExecutor(1, thread_name_prefix="loader") as reader:
            coming = deque()
            try:
                for step in range(first_step, last_step + _STEPS_AHEAD):
                    if step < last_step:
                        coming.append(reader.submit(read, step))
                    if len(coming) > _STEPS_AHEAD or (step >= last_step and coming):
                        yield coming.popleft().result()
            finally:
                for future in coming:
                    future.cancel()


def validation_batches(shards, *, seq_len, batch_size, max_tokens, boundary="ignore", rank=0, world_size=1):
    """
    The first windows of the validation split, in order, each on exactly one process.

    Args:
        batch_size: windows in one yield, at most.
        max_tokens: stop before scoring more tokens than this (over all processes).
        boundary: see WindowLoader.

    Yields:
        Batch of up to batch_size rows. Processes may get different numbers of windows: sum losses and token counts,
        and add those up over processes at the end.

    Raises:
        DataError: too little data for a window, max_tokens too small for one.
    """
    windows = _Windows(shards, seq_len)
    count = min(len(windows), max_tokens // seq_len)
    if count == 0:
        raise DataError(
            f"no validation window of {seq_len} + 1 tokens: the split has {sum(len(s) for s in shards):,} tokens and "
            f"eval.val_tokens is {max_tokens:,}; give more text, or more val_tokens"
        )
    mine = np.arange(rank, count, world_size)
    for start in range(0, len(mine), batch_size):
        yield windows.read(mine[start : start + batch_size], boundary)
