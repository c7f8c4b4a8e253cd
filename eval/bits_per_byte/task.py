"""Validation loss and bits per byte of any text or folder of shards, in sliding windows."""

import hashlib
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval import EvalError
from eval.bits_per_byte.compression import bits_per_byte
from eval.items import Source, check_limit, first_items, sha256_of
from eval.scoring import Request
from eval.task import BaseTask, Item, encode

# Where a model has no longest input of its own.
UNLIMITED = 1024


@dataclass(frozen=True, kw_only=True)
class Task(BaseTask):
    """
    Every token of a text is scored once. The first window scores as many as the model takes; each further one
    `stride` more, behind as many earlier ones as fit: the windows of lm-evaluation-harness (utils.py,
    `get_rolling_token_windows`), which takes a stride of the whole context, as training's validation loss does.
    A shorter one costs more passes and gives every token more to go by.

        text       each document by itself, led by the model's beginning- or end-of-text token
        shards     the validation split as one stream. The loss is over all its tokens, the bits per byte over those
                   that are text: end-of-text has no bytes, and a byte nothing to say about it
    """

    data: str = ""
    """a folder of shards (its validation split), or files and folders as `python -m data.prepare files` reads them"""
    stride: int | None = None
    """tokens from window to window, at most the model's context; None for half of it"""

    version = 1
    figures = {  # noqa: RUF012 (a constant)
        "loss": "nats a token",
        "perplexity": "of a token, exp(loss)",
        "bits_per_byte": "of UTF-8 text, the same for every tokenizer",
    }

    def read(self, tokenizer, max_inputs):
        """`limit` counts documents of text, windows of shards. See BaseTask."""
        if not self.data:
            raise EvalError("bits_per_byte needs a text: name it with --data bits_per_byte=PATH (files, or shards)")
        check_limit(self.limit)
        max_inputs = max_inputs or UNLIMITED
        stride = self.stride if self.stride is not None else max(1, max_inputs // 2)
        if not 1 <= stride <= max_inputs:
            raise EvalError(f"stride {stride} is not between 1 and the model's context of {max_inputs}")
        from data import DataError

        try:
            if is_shards(self.data):
                return self._from_shards(tokenizer, max_inputs, stride)
            return self._from_text(tokenizer, max_inputs, stride)
        except DataError as error:
            raise EvalError(str(error).replace(", or give --errors replace", "")) from error  # which is data.prepare's

    def _from_shards(self, tokenizer, max_inputs, stride):
        from data.manifest import open_split
        from data.tokenizer import EOT, VOCAB_SIZE, encode_document

        probe = "GPT-2 wrote 1,024 tokens."
        if encode(tokenizer, [probe]) != [encode_document(probe)[1:].tolist()]:
            raise EvalError(
                f"{self.data}: shards hold GPT-2's tokens, and the model's tokenizer is another; score the text they "
                "were made of"
            )
        # A byte-level tokenizer spells each byte of a token as one character.
        lengths = np.array([len(text) for text in tokenizer.convert_ids_to_tokens(range(VOCAB_SIZE))], dtype=np.uint8)
        lengths[EOT] = 0
        windows = [
            (shard, start, stop)
            for shard in open_split(self.data, "val")
            for start, stop in _windows(len(shard) - 1, max_inputs, stride)
        ]
        if not windows:
            raise EvalError(f"{self.data}: the validation split has no two tokens")
        windows, count = first_items(windows, self.limit)
        items, digest = [], hashlib.sha256()
        for shard, start, stop in windows:
            begin = max(0, stop - max_inputs)
            tokens = shard[begin : stop + 1]  # the first of them is never scored
            context, scored = tokens[: start - begin + 1], tokens[start - begin + 1 :]
            num_bytes = lengths[scored]
            reference = {"is_text": num_bytes > 0, "num_bytes": int(num_bytes.sum())}
            items.append(Item([Request(context, [scored])], reference))
            digest.update(scored.astype("<u2").tobytes())
        description = f"{self.data}, validation split, stride {stride}, {count.replace('items', 'windows')}"
        return items, Source(description=description, sha256=digest.hexdigest())

    def _from_text(self, tokenizer, max_inputs, stride):
        from data.sources import FileSource, Progress, document

        source = FileSource([self.data])
        records = (
            record
            for file in source.inputs()
            for record in source.records(file, source.fetch(file), Progress(file["bytes"]))
        )
        texts = (text for text in map(document, records) if text and not text.isspace())
        texts = list(itertools.islice(texts, self.limit))  # no more is read than that
        if not texts:
            raise EvalError(f"{self.data}: no text in it")
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise EvalError("the tokenizer has neither a beginning- nor an end-of-text token to begin a text with")
        items = []
        for text, tokens in zip(texts, encode(tokenizer, texts), strict=True):
            tokens = [first, *tokens]
            for start, stop in _windows(len(tokens) - 1, max_inputs, stride):
                request = Request(tokens[max(0, stop - max_inputs) : start + 1], [tokens[start + 1 : stop + 1]])
                # The text's bytes are counted once, with its first window: tokens need not end where characters do.
                num_bytes = len(text.encode()) if start == 0 else 0
                items.append(Item([request], {"is_text": slice(None), "num_bytes": num_bytes}))
        count = f"{'all' if self.limit is None else 'the first'} {len(texts):,} documents"
        description = f"{self.data}, stride {stride}, {count}"
        return items, Source(description=description, sha256=sha256_of(texts))

    def answer(self, item, scores):
        """The log-likelihood (nats) and number of a window's tokens; of those that are text, that and the bytes."""
        [[score]] = scores
        of_text = score.log_likelihoods[item.reference["is_text"]]
        return {
            "log_likelihood": score.log_likelihood,
            "num_tokens": score.num_tokens,
            "text_log_likelihood": float(of_text.sum(dtype=np.float64)),
            "num_bytes": item.reference["num_bytes"],
        }

    def results(self, answers):
        """loss, perplexity, bits_per_byte, num_tokens, num_bytes, and n, the windows."""
        num_tokens = sum(answer["num_tokens"] for answer in answers)
        loss = -math.fsum(answer["log_likelihood"] for answer in answers) / num_tokens
        num_bytes = [answer["num_bytes"] for answer in answers]
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": bits_per_byte([answer["text_log_likelihood"] for answer in answers], num_bytes),
            "num_tokens": num_tokens,
            "num_bytes": sum(num_bytes),
            "n": len(answers),
        }


def is_shards(path):
    """Whether a path is a folder of shards, finished or not, rather than text."""
    from data.manifest import PREPARING, foreign_shards

    folder = Path(path)
    return folder.is_dir() and bool(foreign_shards(folder) or (folder / PREPARING).exists())


def _windows(num_tokens, max_inputs, stride):
    """[(first, one past the last)] of the tokens that each window scores, counted from the first that is scored."""
    edges = [0, *range(min(max_inputs, num_tokens), num_tokens, stride), num_tokens]
    return list(itertools.pairwise(edges)) if num_tokens > 0 else []
