"""Make the parts of a preparation: fetch the input files, and tokenize them or import them as shards.

The shards of a part depend only on the plan and the part (with max_tokens, also on the parts before it).
"""

import contextlib
import glob
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import numpy as np
from tqdm import tqdm

from data.encode import Encoded, EncodeOptions, Encoder
from data.hub import in_background
from data.manifest import SPLITS, Manifest
from data.plan import ShardSource, Source, TextSource
from data.shards import ShardWriter
from data.sources import Progress, Record
from data.tokenizer import Tokenizer

_SECONDS_BETWEEN_LINES = 30


class _Display:
    """Show the progress: a bar on a terminal, lines otherwise."""

    def __init__(self, progress: Progress, max_tokens: int | None, log: Callable[[str], object]) -> None:
        self.progress, self._max_tokens, self._log = progress, max_tokens, log
        self.waiting_for: str | None = None
        self._tokens = self._documents = 0
        self._at_start = progress.bytes_done
        self._started = self._last_line = time.monotonic()
        self._bar = tqdm(
            total=100.0,
            bar_format="{percentage:3.0f}% |{bar:25}| {desc}",
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> Self:
        self._stopped = threading.Event()
        threading.Thread(target=self._show_waiting, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        if self._tokens:
            self._log(self._line())
        self._bar.close()

    def _show_waiting(self) -> None:
        while not self._stopped.wait(_SECONDS_BETWEEN_LINES):
            if self.waiting_for is not None:
                self._log(f"download  waiting for {self.waiting_for}")

    def file_done(self, file: dict[str, Any]) -> None:
        """Count an input file as read."""
        self.progress.bytes_done += file["bytes"]
        self.progress.bytes_here = 0

    def update(self, num_tokens: int, num_documents: int) -> None:
        """Add to the counts and show them, unless they were shown just before."""
        self._tokens += num_tokens
        self._documents += num_documents
        now = time.monotonic()
        if now - self._last_line > (_SECONDS_BETWEEN_LINES if self._bar.disable else 0.1):
            self._last_line = now
            if self._bar.disable:
                self._log(self._line())
            else:
                self._bar.n = 100 * self._fraction()
                self._bar.set_description_str(self._line().removeprefix("tokens    "))

    def _fraction(self) -> float:
        bytes_read = self.progress.bytes_done + min(self.progress.bytes_here, self.progress.total_bytes)
        fraction = bytes_read / max(1, self.progress.total_bytes)
        if self._max_tokens is not None:
            fraction = max(fraction, self._tokens / self._max_tokens)
        return min(1.0, fraction)

    def _line(self) -> str:
        seconds = time.monotonic() - self._started
        done, at_start = self._fraction(), self._at_start / max(1, self.progress.total_bytes)
        left = ""
        if done > at_start:
            left = f", {timedelta(seconds=round((1 - done) / (done - at_start) * seconds))} left"
        return (
            f"tokens    {self._tokens:,} of {self._documents:,} documents, {self._documents / seconds:,.0f} "
            f"documents/s, {self._tokens / seconds / 1e6:.2f}M tokens/s{left}"
        )


class PartMaker:
    """Make parts, in order, with one pool of processes. The next input file is fetched while one is read."""

    def __init__(
        self,
        plan: Manifest,
        source: Source,
        out: Path,
        parts: Sequence[int],
        *,
        finished: Collection[int] = (),
        tokens_before: int = 0,
        num_proc: int,
        tokenizer: Tokenizer,
        log: Callable[[str], object] = lambda line: None,
    ) -> None:
        """Set up the encoder, unless the source has shards.

        Args:
            plan: the folder's plan, or its manifest.
            parts: the parts of this machine.
            finished: parts that will not be made.
            tokens_before: tokens in other parts, which count toward max_tokens.
        """
        self.plan, self.source, self.out = plan, source, out
        files = [file for file in plan.inputs if file["part"] in parts]
        self._files = [file for file in files if file["part"] not in finished]
        self._inputs = self._fetch_ahead()
        self._read: list[Path] = []  # the part's input files
        self._tokens_left = None if plan.max_tokens is None else plan.max_tokens - tokens_before
        progress = Progress(sum(file["bytes"] for file in files))
        progress.bytes_done = sum(file["bytes"] for file in files if file["part"] in finished)
        self._display = _Display(progress, plan.max_tokens, log)
        self._finisher = ThreadPoolExecutor(1)
        self._vocabulary = tokenizer.vocabulary
        self._stack = contextlib.ExitStack()
        self._encoder: Encoder | None = None
        if plan.val_fraction is not None:
            names = ("text_column", "errors", "parse_eos")
            options = {name: plan.source[name] for name in names if name in plan.source}
            self._encoder = Encoder(EncodeOptions(tokenizer, plan.val_fraction, **options), num_proc=num_proc)

    def __enter__(self) -> Self:
        self._stack.enter_context(self._display)
        self._stack.enter_context(self._finisher)
        if self._encoder is not None:
            self._stack.enter_context(self._encoder)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def make(self, part: int) -> dict[str, Any]:
        """Make a part and return its record: {"part", "shards", "is_full"}."""
        if isinstance(self.source, ShardSource):
            return self._import_shard(self.source, part)
        assert self._encoder is not None and self.plan.shard_tokens is not None
        writers = {split: self._writer(split, part, self.plan.shard_tokens) for split in SPLITS}
        is_full, null_rows, eos_texts = False, 0, 0
        try:
            with contextlib.closing(self._encoder.encode(self._records(self.source, part))) as batches:
                for batch in batches:
                    null_rows += int(batch.null_rows)
                    eos_texts += int(batch.eos_texts)
                    kept = self._up_to_max_tokens(batch)
                    for split, mask in (("val", kept.is_val), ("train", ~kept.is_val)):
                        writers[split].add(kept.tokens[np.repeat(mask, kept.lengths)], kept.lengths[mask])
                    self._display.update(len(kept.tokens), len(kept.lengths))
                    is_full = len(kept.lengths) < len(batch.lengths)
                    if is_full:
                        break
            shards = [
                {"file": shard.pop("file"), "split": split, "part": part, **shard}
                for split in SPLITS
                for shard in writers[split].finish()
            ]
        finally:
            for writer in writers.values():
                writer.abandon()
        counts = {"null_rows": null_rows, "eos_texts": eos_texts}
        return {"part": part, "shards": shards, "is_full": is_full, **counts}

    def release_inputs(self) -> None:
        """Remove downloaded files of documents, after their part was recorded."""
        while self._read:
            path = self._read.pop()
            if not isinstance(self.source, ShardSource):
                self.source.done_with(path)

    def _import_shard(self, source: ShardSource, part: int) -> dict[str, Any]:
        file, path = next(self._inputs)
        entry = source.import_shard(file, path, self.out)
        self._display.file_done(file)
        self._display.update(entry["tokens"], entry["documents"])
        shard = {"file": entry.pop("file"), "split": entry.pop("split"), "part": part, **entry}
        return {"part": part, "shards": [shard], "is_full": False}

    def _fetch_ahead(self) -> Iterator[tuple[dict[str, Any], Path]]:
        """Yield each file with the path of a local copy."""
        fetching = None
        for file, next_file in zip(self._files, [*self._files[1:], None], strict=True):
            fetching = fetching or in_background(self.source.fetch, file)
            self._display.waiting_for = file["path"]
            path = fetching.result()
            self._display.waiting_for = fetching = None
            # With max_tokens, this file may be the last one: a token takes 2 to 4 bytes in most kinds of files.
            if next_file is not None and (self._tokens_left is None or self._tokens_left > file["bytes"] / 4):
                fetching = in_background(self.source.fetch, next_file)
            yield file, path

    def _writer(self, split: str, part: int, shard_tokens: int) -> ShardWriter:
        prefix = f"{self.plan.name}_{split}_{part:05d}"
        for stale in [*self.out.glob(f"{glob.escape(prefix)}*"), *self.out.glob(f".{glob.escape(prefix)}*")]:
            stale.unlink()  # from an interrupted run
        return ShardWriter(
            self.out, prefix, shard_tokens=shard_tokens, executor=self._finisher, vocabulary=self._vocabulary
        )

    def _records(self, source: TextSource, part: int) -> Iterator[Record]:
        for _ in range(sum(file["part"] == part for file in self._files)):
            file, path = next(self._inputs)
            self._read.append(path)
            yield from source.records(file, path, self._display.progress)
            self._display.file_done(file)

    def _up_to_max_tokens(self, batch: Encoded) -> Encoded:
        """Cut a batch after the last document that fits."""
        if self._tokens_left is None:
            return batch
        count = int(np.searchsorted(np.cumsum(batch.lengths), self._tokens_left, side="right"))
        lengths = batch.lengths[:count]
        tokens = batch.tokens[: lengths.sum()]
        self._tokens_left -= len(tokens)
        return batch._replace(tokens=tokens, lengths=lengths, is_val=batch.is_val[:count])
