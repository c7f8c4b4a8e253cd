"""Loss and bits per byte of any text or folder of shards, in sliding windows."""

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.manifest import PREPARING, open_split, shard_tokenizer, unmanaged_shards
from data.sources import FileSource
from eval import EvalError
from eval.items import DataInfo, first_items, sha256_of
from eval.scoring import Request, Tokenizer
from eval.task import BaseTask, Item, ItemResult, ItemScores, encode, perplexity
from eval.windows import DEFAULT_MAX_LENGTH, rolling_requests, start_token, windows


@dataclass(frozen=True, kw_only=True)
class Task(BaseTask):
    """The loss of a text or of shards, with every token scored once.

    The first window scores as many tokens as fit the model. Each further window scores `stride` more, after as many
    earlier ones as fit. With a stride of the full context, these are the windows of lm-evaluation-harness (utils.py,
    `get_rolling_token_windows`) and of training's validation loss. A shorter stride gives tokens longer contexts.

        text       each document separately, after the model's beginning- or end-of-text token
        shards     the validation split as one stream; end-of-text counts for the loss but has no bytes
    """

    data: str = ""
    """a folder of shards (its validation split), or files and folders as `python -m data.prepare files` reads them"""
    stride: int | None = None
    """tokens per window after the first, at most the model's context; None for half of it"""

    version = 1
    metrics = {  # noqa: RUF012 (a constant)
        "loss": "nats per token",
        "perplexity": "per token, exp(loss)",
        "bits_per_byte": "of UTF-8 text, comparable between tokenizers",
    }
    main_metric = "bits_per_byte"

    def read(self, tokenizer: Tokenizer, max_length: int | None) -> tuple[list[Item], DataInfo]:
        """Read the windows. `limit` counts documents of text, or windows of shards. See BaseTask."""
        if not self.data:
            raise EvalError("bits_per_byte needs a text: give it with --data bits_per_byte=PATH (files, or shards)")
        max_length = max_length or DEFAULT_MAX_LENGTH
        stride = self.stride if self.stride is not None else max(1, max_length // 2)
        if not 1 <= stride <= max_length:
            raise EvalError(f"stride must be between 1 and the model's context of {max_length}, got {stride}")
        folder = Path(self.data)
        is_shards = folder.is_dir() and (unmanaged_shards(folder) or (folder / PREPARING).exists())  # complete or not
        read = self._read_shards if is_shards else self._read_text
        return read(tokenizer, max_length, stride)

    def _read_shards(self, tokenizer: Tokenizer, max_length: int, stride: int) -> tuple[list[Item], DataInfo]:
        lengths = self._byte_lengths(tokenizer)
        shard_windows = [
            (shard, start, stop)
            for shard in open_split(self.data, "val")
            for start, stop in windows(len(shard) - 1, max_length, stride)
        ]
        if not shard_windows:
            raise EvalError(f"{self.data}: the validation split has fewer than two tokens; prepare it from more text")
        kept, count = first_items(shard_windows, self.limit)
        items, digest = [], hashlib.sha256()
        for shard, start, stop in kept:
            first = max(0, stop - max_length)
            tokens = shard[first : stop + 1]  # the first of them is never scored
            context, scored = tokens[: start - first + 1], tokens[start - first + 1 :]
            num_bytes = lengths[scored]
            reference = {"is_text": num_bytes > 0, "num_bytes": int(num_bytes.sum())}
            items.append(Item([Request(context, [scored])], reference))
            digest.update(scored.tobytes())
        description = f"{self.data}, validation split, stride {stride}, {count.replace('items', 'windows')}"
        return items, DataInfo(description=description, sha256=digest.hexdigest())

    def _byte_lengths(self, tokenizer: Tokenizer) -> np.ndarray:
        """Return the number of bytes of each token, [V]. Raises EvalError if the model has another tokenizer."""
        own = shard_tokenizer(self.data)
        probe, owner = "GPT-2 wrote 1,024 tokens.", "GPT-2" if own.is_gpt2 else repr(own.name)
        is_same = encode(tokenizer, [probe]) == [own.encode_document(probe, starts=False).tolist()]
        if is_same and not own.is_gpt2:
            is_same = all(tokenizer.convert_ids_to_tokens([i]) == [token] for token, i in own.ids().items())
        if not is_same:
            raise EvalError(
                f"{self.data}: shards hold {owner}'s tokens, and the model has another tokenizer; score the text that "
                "they were made from"
            )
        lengths = own.byte_lengths()
        if lengths is None:
            raise EvalError(
                f"{self.data}: {owner} is not a byte-level tokenizer, so its tokens have no number of bytes; score the "
                "text that the shards were made from"
            )
        return lengths

    def _read_text(self, tokenizer: Tokenizer, max_length: int, stride: int) -> tuple[list[Item], DataInfo]:
        source = FileSource([self.data])
        documents = (document.text or "" for task in source.tasks() for document in source.documents(task))
        texts = [*itertools.islice((text for text in documents if text.strip()), self.limit)]  # reads no further
        if not texts:
            raise EvalError(f"{self.data}: the file has no text; give one that has text")
        start, items = start_token(tokenizer), []
        for text, tokens in zip(texts, encode(tokenizer, texts), strict=True):
            for index, request in enumerate(rolling_requests([start, *tokens], max_length, stride)):
                # The text's bytes are counted with its first window, since tokens can end inside a character.
                num_bytes = len(text.encode()) if index == 0 else 0
                items.append(Item([request], {"is_text": slice(None), "num_bytes": num_bytes}))
        count = f"{'all' if self.limit is None else 'the first'} {len(texts):,} documents"
        return items, DataInfo(description=f"{self.data}, stride {stride}, {count}", sha256=sha256_of(texts))

    def process_item(self, item: Item, scores: ItemScores) -> ItemResult:
        """Return a window's log-likelihood (nats) and number of tokens, and the same for its text, with its bytes."""
        [[score]] = scores
        text_log_likelihoods = score.log_likelihoods[item.reference["is_text"]]
        return {
            "log_likelihood": score.log_likelihood,
            "num_tokens": score.num_tokens,
            "text_log_likelihood": float(text_log_likelihoods.sum(dtype=np.float64)),
            "num_bytes": item.reference["num_bytes"],
        }

    def compute_metrics(self, item_results: Sequence[ItemResult]) -> dict[str, float]:
        """Return loss, perplexity, bits_per_byte, num_tokens, num_bytes, and n (windows)."""
        num_tokens = sum(result["num_tokens"] for result in item_results)
        num_bytes = sum(result["num_bytes"] for result in item_results)
        loss = -math.fsum(result["log_likelihood"] for result in item_results) / num_tokens
        text_nats = -math.fsum(result["text_log_likelihood"] for result in item_results)
        return {
            "loss": loss,
            "perplexity": perplexity(loss),
            "bits_per_byte": text_nats / (math.log(2) * num_bytes) if num_bytes else math.nan,
            "num_tokens": num_tokens,
            "num_bytes": num_bytes,
            "n": len(item_results),
        }
