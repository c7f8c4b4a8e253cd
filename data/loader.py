"""Batches of windows.

Window w of a shard is its tokens [w T, w T + T], T + 1 of them: T inputs, and for each the token that follows it. The
windows of a step are a pure function of (seed, step):

    stream    permutation of all windows by (seed, epoch 0), then by (seed, epoch 1), ...
    step s    the stream's positions s B ... s B + B - 1, for a global batch of B windows
    rank r    of W processes takes rows r B/W ... (r + 1) B/W - 1 of them

So each window comes once per epoch, any step can be read directly, and the training data does not depend on the number
of processes or on a crash.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch

from data import DataError
from data.permutation import Permutation
from data.shards import Shard
from data.tokenizer import EOT

ORDERS = ("shuffled", "sequential", "lecture")
BOUNDARIES = ("ignore", "document")
_LECTURE_GPUS = 8
_STEPS_AHEAD = 2


class Batch(NamedTuple):
    """Inputs and targets of a training or validation step, each [rows, T] int64."""

    inputs: torch.Tensor
    targets: torch.Tensor
    """the token after each input"""
    position_ids: torch.Tensor | None
    """0 at the beginning of each document; None if windows ignore documents"""

    def split(self, rows: int) -> list["Batch"]:
        """Split into batches of this many rows each."""
        starts = range(0, len(self.inputs), rows)
        return [self.map(itemgetter(slice(start, start + rows))) for start in starts]

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device; from pinned memory to a GPU, the host does not wait."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """Apply a function to each tensor."""
        position_ids = None if self.position_ids is None else function(self.position_ids)
        return Batch(function(self.inputs), function(self.targets), position_ids)


class _Windows:
    """All windows of several shards, numbered consecutively."""

    def __init__(self, shards: Sequence[Shard], seq_len: int) -> None:
        self.shards, self.seq_len = shards, seq_len
        counts = [max(0, (len(shard) - 1) // seq_len) for shard in shards]
        self.starts = np.cumsum([0, *counts])  # first window of each shard

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the shard number and the offset of the first token in it of each window, both [N]."""
        numbers = np.searchsorted(self.starts, indices, side="right") - 1
        return numbers, (indices - self.starts[numbers]) * self.seq_len

    def read(self, indices: np.ndarray, boundary: str) -> Batch:
        """Read windows into a batch, one row each."""
        T = self.seq_len
        numbers, begins = self.locate(indices)
        rows = np.empty((len(indices), T + 1), dtype=self.shards[0].dtype)
        for row, number, begin in zip(rows, numbers.tolist(), begins.tolist(), strict=True):
            row[:] = self.shards[number][begin : begin + T + 1]
        # Not in torch, which would start its own threads for each operation in the reader thread.
        tokens = rows.astype(np.int64)
        position_ids = (
            _document_positions(rows[:, :-1], self.shards[0].vocabulary.eos_id) if boundary == "document" else None
        )
        return Batch(
            torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])),
            torch.from_numpy(np.ascontiguousarray(tokens[:, 1:])),
            None if position_ids is None else torch.from_numpy(position_ids),
        )


def _document_positions(inputs: np.ndarray, eos_id: int = EOT) -> np.ndarray:
    """Return the position of each token in its document, [rows, T]; a document cut at the front counts from there."""
    position = np.arange(inputs.shape[1])
    begin = np.maximum.accumulate(np.where(inputs == eos_id, position, 0), axis=1)
    return position - begin


class WindowLoader:
    """The training batches of one process; see the top of this file."""

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        order: str = "shuffled",
        boundary: str = "ignore",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Check the settings and number the windows.

        Args:
            shards: the training shards, from `data.manifest.open_split`.
            seq_len: T, tokens in a training sequence.
            batch_size: B, windows per step over all processes.
            order: "shuffled"; "sequential", the order in the shards, the same in each epoch; or "lecture", see
                `_lecture_batch`.
            boundary: "ignore", or "document": position ids restart at each document.

        Raises:
            DataError: the shards have no window, or the settings do not fit.
        """
        if batch_size % world_size:
            raise DataError(f"a batch of {batch_size} windows cannot be divided evenly by {world_size} processes")
        for name, value, choices in (("order", order, ORDERS), ("boundary", boundary, BOUNDARIES)):
            if value not in choices:
                raise DataError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        self.windows = _Windows(shards, seq_len)
        if not len(self.windows):
            raise DataError(
                f"{sum(len(shard) for shard in shards):,} training tokens in {len(shards)} shard(s) have no window of "
                f"{seq_len} + 1 tokens; give more text or a shorter batch.seq_len"
            )
        if order == "lecture":
            _check_lecture_order(shards, seq_len, batch_size)
        self.batch_size, self.seed, self.order, self.boundary = batch_size, seed, order, boundary
        self.rank, self.world_size = rank, world_size

    @property
    def num_windows(self) -> int:
        """Windows per epoch."""
        return len(self.windows)

    @property
    def tokens_per_epoch(self) -> int:
        """Training tokens per epoch."""
        return len(self.windows) * self.windows.seq_len

    def global_batch(self, step: int) -> np.ndarray:
        """Return the window numbers of a step, [B] int64, the same on every process."""
        if self.order == "lecture":
            return self._lecture_batch(step)
        stream = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, windows = np.divmod(stream, len(self.windows))
        if self.order == "shuffled":
            for epoch in np.unique(epochs):
                permutation = Permutation(len(self.windows), f"seed {self.seed}, epoch {epoch}")
                windows[epochs == epoch] = permutation(windows[epochs == epoch])
        return windows

    def _lecture_batch(self, step: int) -> np.ndarray:
        """Return the windows that the lecture's 8 GPUs read (DataLoaderLite of build-nanogpt's train_gpt2.py).

        GPU g starts a shard at the g-th eighth of its first B T tokens and advances by B T per step, as long as one
        more such step and a token fit after its position. So the last GPUs finish a shard one step before the first
        ones, and are one more step ahead of them after each such shard.
        """
        rows = self.batch_size // _LECTURE_GPUS
        parts = []
        for gpu in range(_LECTURE_GPUS):
            steps_per_shard = [
                (len(shard) - 1 - gpu * rows * self.windows.seq_len) // (self.batch_size * self.windows.seq_len)
                for shard in self.windows.shards
            ]
            ends = np.cumsum(steps_per_shard)
            step_in_epoch = step % ends[-1]
            shard = np.searchsorted(ends, step_in_epoch, side="right")
            step_in_shard = step_in_epoch - (ends[shard] - steps_per_shard[shard])
            first = self.windows.starts[shard] + step_in_shard * self.batch_size + gpu * rows
            parts.append(np.arange(first, first + rows))
        return np.concatenate(parts)

    def window_origins(self, step: int) -> list[dict[str, Any]]:
        """Return {"shard": file name, "first_token": offset in it} of each of this process's windows of a step."""
        numbers, begins = self.windows.locate(self._rank_windows(step))
        names = [shard.path and shard.path.name for shard in self.windows.shards]
        return [
            {"shard": names[number], "first_token": begin}
            for number, begin in zip(numbers.tolist(), begins.tolist(), strict=True)
        ]

    def _rank_windows(self, step: int) -> np.ndarray:
        rows = self.batch_size // self.world_size
        return self.global_batch(step)[self.rank * rows : (self.rank + 1) * rows]

    def batch(self, step: int) -> Batch:
        """Read this process's B / world_size rows of a step; step 0 is the first.

        Raises:
            DataError: a token differs from the one that was written, or is not in the vocabulary.
        """
        return self.windows.read(self._rank_windows(step), self.boundary)

    def batches(self, first_step: int, last_step: int, *, pin_memory: bool = False) -> Generator[Batch, None, None]:
        """Read the batches of the steps first_step ... last_step - 1 ahead of time, in a background thread.

        With `pin_memory` they are in pinned memory, from which a GPU copies asynchronously.
        """

        def read(step: int) -> Batch:
            batch = self.batch(step)
            return batch.map(torch.Tensor.pin_memory) if pin_memory else batch

        with ThreadPoolExecutor(1, thread_name_prefix="loader") as reader:
            pending: deque[Future[Batch]] = deque()
            try:
                for step in range(first_step, last_step + _STEPS_AHEAD):
                    if step < last_step:
                        pending.append(reader.submit(read, step))
                    if len(pending) > _STEPS_AHEAD or (step >= last_step and pending):
                        yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    def val_batches(self, shards: Sequence[Shard], batch_size: int, max_tokens: int) -> Iterator[Batch]:
        """Read windows of the validation split, of the same length and boundary; see `validation_batches`."""
        return validation_batches(
            shards,
            seq_len=self.windows.seq_len,
            batch_size=batch_size,
            max_tokens=max_tokens,
            boundary=self.boundary,
            rank=self.rank,
            world_size=self.world_size,
        )


def _check_lecture_order(shards: Sequence[Shard], seq_len: int, batch_size: int) -> None:
    tokens = batch_size * seq_len
    num_short = sum(len(shard) < 2 * tokens for shard in shards)
    if batch_size % _LECTURE_GPUS or num_short:
        raise DataError(
            f"order 'lecture' needs a batch divisible by {_LECTURE_GPUS} and shards of at least two batches: "
            f"the batch has {batch_size} windows ({tokens:,} tokens), and {num_short} shard(s) have less than two "
            "batches; use order 'sequential'"
        )


def validation_batches(
    shards: Sequence[Shard],
    *,
    seq_len: int,
    batch_size: int,
    max_tokens: int,
    boundary: str = "ignore",
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Read the first windows of the validation split, in order, each on exactly one process; see WindowLoader.

    Processes may get different numbers of windows: sum the losses and the token counts over the processes at the end.

    Args:
        shards: the validation shards.
        batch_size: maximum number of rows in a batch.
        max_tokens: maximum number of tokens to score, over all processes.
    """
    windows = _Windows(shards, seq_len)
    count = min(len(windows), max_tokens // seq_len)
    if count == 0:
        raise DataError(
            f"no validation window of {seq_len} + 1 tokens: the split has {sum(len(s) for s in shards):,} tokens and "
            f"eval.val_tokens is {max_tokens:,}; give more text, or more val_tokens"
        )
    rank_windows = np.arange(rank, count, world_size)
    for start in range(0, len(rank_windows), batch_size):
        yield windows.read(rank_windows[start : start + batch_size], boundary)
