"""Training and validation batches.

The windows (see windows.py) of a step are a pure function of (seed, step):

    stream    permutation of all windows by (seed, epoch 0), then by (seed, epoch 1), ...
    step s    the stream's positions s B ... s B + B - 1, for a global batch of B windows
    rank r    of W processes takes rows r B/W ... (r + 1) B/W - 1 of them

So each window comes once per epoch, any step can be read directly, and the training data does not depend on the number
of processes or on a crash. With several sources (see mixture.py), each has its own stream, of which a step takes the
next positions, and the rows of a step are permuted by (seed, step), so that every process gets windows of all sources.
"""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch

from data import DataError
from data.mixture import Shares, normalize
from data.permutation import Permutation
from data.shards import Shard
from data.windows import Batch, Windows

ORDERS = ("shuffled", "sequential", "lecture")
BOUNDARIES = ("ignore", "document")
_LECTURE_GPUS = 8
_STEPS_AHEAD = 2


class WindowLoader:
    """The training batches of one process; see the top of this file."""

    def __init__(
        self,
        sources: Sequence[Sequence[Shard]],
        *,
        weights: Sequence[float] = (1.0,),
        seq_len: int,
        batch_size: int,
        seed: int,
        order: str = "shuffled",
        boundary: str = "ignore",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Check the settings and number the windows, those of the first source first.

        Args:
            sources: the training shards of each folder, from `data.manifest.open_split`.
            weights: of the sources; only their proportions matter.
            seq_len: T, tokens in a training sequence.
            batch_size: B, windows per step over all processes.
            order: "sequential" is the order in the shards, the same in each epoch; for "lecture", see `_lecture_batch`.
            boundary: "document": position ids restart at each document.
        """
        if batch_size % world_size:
            raise DataError(f"a batch of {batch_size} windows cannot be divided evenly by {world_size} processes")
        for name, value, choices in (("order", order, ORDERS), ("boundary", boundary, BOUNDARIES)):
            if value not in choices:
                raise DataError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        self.windows = Windows([*chain(*sources)], seq_len)
        self.counts = [_count_windows(shards, seq_len) for shards in sources]
        """windows of each source, per epoch"""
        if order == "lecture":
            _check_lecture_order(sources, seq_len, batch_size)
        self.weights = [float(share) for share in normalize(weights)]
        """shares of the sources, which add up to 1"""
        self._shares = Shares(weights, batch_size)
        self.batch_size, self.seed, self.order, self.boundary = batch_size, seed, order, boundary
        self.rank, self.world_size = rank, world_size

    def epochs(self, num_steps: int) -> list[float]:
        """Return how often the first steps of a run read each source."""
        windows = self._shares.windows_before(num_steps)
        return [read / count for read, count in zip(windows, self.counts, strict=True)]

    def global_batch(self, step: int) -> np.ndarray:
        """Return the window numbers of a step, [B] int64, the same on every process."""
        if self.order == "lecture":
            return self._lecture_batch(step)
        begins, ends = self._shares.windows_before(step), self._shares.windows_before(step + 1)
        firsts = accumulate(self.counts, initial=0)  # of the sources' windows
        parts = [
            first + self._source_windows(source, np.arange(begin, end))
            for source, (first, begin, end) in enumerate(zip(firsts, begins, ends, strict=False))
        ]
        if len(parts) == 1:
            return parts[0]
        rows = Permutation(self.batch_size, f"seed {self.seed}, step {step}")(np.arange(self.batch_size))
        return np.concatenate(parts)[rows]

    def _source_windows(self, source: int, positions: np.ndarray) -> np.ndarray:
        """Return the windows at positions of a source's stream, numbered from its first one."""
        count = self.counts[source]
        epochs, windows = np.divmod(positions, count)
        if self.order == "shuffled":
            key = f"seed {self.seed}" if len(self.counts) == 1 else f"seed {self.seed}, source {source}"
            for epoch in np.unique(epochs):
                is_in_epoch = epochs == epoch
                windows[is_in_epoch] = Permutation(count, f"{key}, epoch {epoch}")(windows[is_in_epoch])
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
        """Return {"shard": file name, "first_token": offset in it} of each of this process's windows of a step.

        With several sources, they also have "folder".
        """
        numbers, begins = self.windows.locate(self._rank_windows(step))
        paths = [shard.path for shard in self.windows.shards]
        names = [{"shard": path and path.name} for path in paths]
        if len(self.counts) > 1:
            names = [{"folder": path and str(path.parent), **name} for path, name in zip(paths, names, strict=True)]
        return [
            {**names[number], "first_token": begin}
            for number, begin in zip(numbers.tolist(), begins.tolist(), strict=True)
        ]

    def _rank_windows(self, step: int) -> np.ndarray:
        rows = self.batch_size // self.world_size
        return self.global_batch(step)[self.rank * rows : (self.rank + 1) * rows]

    def batch(self, step: int) -> Batch:
        """Read this process's B / world_size rows of a step; step 0 is the first."""
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
                reader.shutdown(cancel_futures=True)

    def val_batches(self, shards: Sequence[Shard], batch_size: int, max_tokens: int) -> Iterator[Batch]:
        """Read windows of the validation split, of the same length and boundary; see `validation_batches`."""
        options: dict[str, Any] = {"seq_len": self.windows.seq_len, "boundary": self.boundary}
        options |= {"rank": self.rank, "world_size": self.world_size}
        return validation_batches(shards, batch_size=batch_size, max_tokens=max_tokens, **options)


def _count_windows(shards: Sequence[Shard], seq_len: int) -> int:
    count = len(Windows(shards, seq_len))
    if not count:
        path = next((shard.path for shard in shards), None)
        folder = f" of {path.parent}" if path else ""
        raise DataError(
            f"{sum(len(shard) for shard in shards):,} training tokens in {len(shards)} shard(s){folder} have no window "
            f"of {seq_len} + 1 tokens; give more text or a shorter batch.seq_len"
        )
    return count


def _check_lecture_order(sources: Sequence[Sequence[Shard]], seq_len: int, batch_size: int) -> None:
    if len(sources) > 1:
        raise DataError("order 'lecture' reads one folder, and data.mix has several; use order 'shuffled'")
    shards = sources[0]
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
    `batch_size` is the maximum number of rows, `max_tokens` that of the tokens to score, over all processes.
    """
    windows = Windows(shards, seq_len)
    count = min(len(windows), max_tokens // seq_len)
    if count == 0:
        raise DataError(
            f"no validation window of {seq_len} + 1 tokens: the split has {sum(len(s) for s in shards):,} tokens and "
            f"eval.val_tokens is {max_tokens:,}; give more text, or more val_tokens"
        )
    rank_windows = np.arange(rank, count, world_size)
    for start in range(0, len(rank_windows), batch_size):
        yield windows.read(rank_windows[start : start + batch_size], boundary)
