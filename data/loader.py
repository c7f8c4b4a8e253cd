"""
Batches of windows. Window w of a shard is its tokens [w T, w T + T], T + 1 of them: T inputs and the T tokens that
follow each. Which windows a step trains on is a pure function of (seed, step):

    stream    permutation of all windows by (seed, epoch 0), then by (seed, epoch 1), ...
    step s    the stream's positions s B ... s B + B - 1, for a global batch of B windows
    rank r    of W processes takes rows r B/W ... (r + 1) B/W - 1 of them

So each window comes once an epoch, any step can be asked for at once, and neither the number of processes nor a
crash changes what is trained on.
"""

import numpy as np
import torch

from data import DataError
from data.shards import check_ids


class _Windows:
    """All windows of some shards under one numbering."""

    def __init__(self, shards, seq_len):
        self.shards, self.seq_len = shards, seq_len
        counts = [max(0, (len(shard) - 1) // seq_len) for shard in shards]
        self.starts = np.cumsum([0, *counts])  # first window of each shard

    def __len__(self):
        return int(self.starts[-1])

    def read(self, indices):
        """(inputs, targets), int64 tensors [len(indices), T]."""
        rows = np.empty((len(indices), self.seq_len + 1), dtype=np.int64)
        for row, index in zip(rows, indices, strict=True):
            number = int(np.searchsorted(self.starts, index, side="right")) - 1
            begin = int(index - self.starts[number]) * self.seq_len
            row[:] = self.shards[number][begin : begin + self.seq_len + 1]
            check_ids(row, self.shards[number], begin)
        tokens = torch.from_numpy(rows)
        return tokens[:, :-1], tokens[:, 1:]


class WindowLoader:
    """The training batches of one process; see the head of this file."""

    def __init__(self, shards, *, seq_len, batch_size, seed, rank=0, world_size=1):
        """
        Args:
            shards: list of [N] uint16 arrays, as `data.shards.open_split` gives them.
            seq_len: T, tokens in a training sequence.
            batch_size: B, windows in a step over all processes.
            seed: of the order.
            rank, world_size: this process and how many there are.

        Raises:
            DataError: too little data for a window, or a batch that the processes cannot share evenly.
        """
        if batch_size % world_size:
            raise DataError(f"a batch of {batch_size} windows cannot be shared evenly by {world_size} processes")
        self.windows = _Windows(shards, seq_len)
        if not len(self.windows):
            raise DataError(
                f"{sum(len(shard) for shard in shards):,} training tokens in {len(shards)} shard(s) hold no window of "
                f"{seq_len} + 1 tokens; give more text or a shorter batch.seq_len"
            )
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.world_size = rank, world_size
        self._permutations = {}  # epoch -> order, for the one or two epochs a batch touches

    @property
    def num_windows(self):
        """Windows in an epoch."""
        return len(self.windows)

    @property
    def tokens_per_epoch(self):
        """Tokens trained on in an epoch."""
        return len(self.windows) * self.windows.seq_len

    def epoch_at(self, step):
        """Epochs trained on before this step, a float."""
        return step * self.batch_size / len(self.windows)

    def global_batch(self, step):
        """Window numbers of a step, [B], the same on every process."""
        epochs, places = np.divmod(np.arange(step * self.batch_size, (step + 1) * self.batch_size), len(self.windows))
        self._permutations = {epoch: self._order(epoch) for epoch in np.unique(epochs)}
        return np.array([self._permutations[epoch][place] for epoch, place in zip(epochs, places, strict=True)])

    def _order(self, epoch):
        if epoch in self._permutations:
            return self._permutations[epoch]
        # RandomState and not default_rng: NumPy promises that its stream never changes (NEP 19).
        return np.random.RandomState([self.seed, int(epoch)]).permutation(len(self.windows))

    def batch(self, step):
        """
        Args:
            step: optimizer steps taken so far; 0 for the first batch.

        Returns:
            (inputs, targets): this process's rows, int64 [B / world_size, T] each.

        Raises:
            DataError: a token that GPT-2 does not have.
        """
        rows = self.batch_size // self.world_size
        return self.windows.read(self.global_batch(step)[self.rank * rows : (self.rank + 1) * rows])


def validation_batches(shards, *, seq_len, batch_size, max_tokens, rank=0, world_size=1):
    """
    The first windows of the validation split, in order, each on exactly one process.

    Args:
        batch_size: windows in one yield, at most.
        max_tokens: stop before scoring more tokens than this (over all processes).

    Yields:
        (inputs, targets), int64 [up to batch_size, T]. Processes may get different numbers of windows: sum
        losses and token counts, and add those up over processes at the end.

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
        yield windows.read(mine[start : start + batch_size])
