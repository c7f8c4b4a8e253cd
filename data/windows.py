"""Windows of shards.

Window w of a shard is its tokens [w T, w T + T], T + 1 of them: T inputs, and for each the token that follows it.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch

from data.shards import Shard


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


class Windows:
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
        inputs, targets = (torch.from_numpy(np.ascontiguousarray(part)) for part in (tokens[:, :-1], tokens[:, 1:]))
        if boundary != "document":
            return Batch(inputs, targets, None)
        positions = _document_positions(rows[:, :-1], self.shards[0].vocabulary.eos_id)
        return Batch(inputs, targets, torch.from_numpy(positions))


def _document_positions(inputs: np.ndarray, eos_id: int) -> np.ndarray:
    """Return the position of each token in its document, [rows, T]; a document cut at the front counts from there."""
    position = np.arange(inputs.shape[1])
    begin = np.maximum.accumulate(np.where(inputs == eos_id, position, 0), axis=1)
    return position - begin
