"""Unigram and bigram losses of a corpus: a language model must beat them to have learned more than counts."""

from collections.abc import Sequence

import numpy as np

from data import DataError
from data.shards import Shard
from data.tokenizer import VOCAB_SIZE


def ngram_baselines(
    train: Sequence[Shard | np.ndarray], val: Sequence[Shard | np.ndarray], vocab_size: int = VOCAB_SIZE
) -> dict[str, float]:
    """Compute the cross-entropy of the validation tokens under a unigram and a bigram model of the training tokens.

    The unigram is add-one smoothed. The bigram is interpolated absolute discounting over that unigram, with the
    discount n1 / (n1 + 2 n2) (Ney, Essen and Kneser 1994; Chen and Goodman 1999, section 2.6). This is a strong
    baseline; beating a weak one would prove nothing.

        p(w | v) = max(c(v, w) - D, 0) / c(v) + D t(v) / c(v) * p(w)      t(v): different words seen after v
        p(w | v) = p(w)                                                  where v was never followed by anything

    Args:
        train: shards, or [N] integer arrays. Pairs do not cross shards.
        val: shards for validation.
        vocab_size: V; token ids are below it.

    Returns:
        {"unigram": nats per token, "bigram": nats per token}, both over every validation token that follows another.
    """
    for split, shards in (("train", train), ("val", val)):
        if not any(len(shard) > 1 for shard in shards):
            raise DataError(f"the {split} split has no two adjacent tokens to count; give more text")
    train_tokens = [shard[:] for shard in train]
    counts = np.bincount(np.concatenate(train_tokens), minlength=vocab_size)
    unigram = (counts + 1) / (counts.sum() + vocab_size)  # [V]

    keys, pair_counts = np.unique(_pairs(train_tokens, vocab_size), return_counts=True)
    n1, n2 = (pair_counts == 1).sum(), (pair_counts == 2).sum()
    discount = n1 / (n1 + 2 * n2) if n1 else 0.5  # a toy corpus: any discount will do
    first = keys // vocab_size
    followers = np.bincount(first, weights=pair_counts, minlength=vocab_size)  # c(v)
    kinds = np.bincount(first, minlength=vocab_size)  # t(v)

    val_pairs = _pairs([shard[:] for shard in val], vocab_size)
    v, w = val_pairs // vocab_size, val_pairs % vocab_size
    index = np.minimum(np.searchsorted(keys, val_pairs), len(keys) - 1)
    count = np.where(keys[index] == val_pairs, pair_counts[index], 0)
    total = np.maximum(followers[v], 1)
    backoff = np.where(followers[v] > 0, discount * kinds[v] / total, 1.0)
    bigram = np.maximum(count - discount, 0) / total + backoff * unigram[w]
    return {"unigram": float(-np.log(unigram[w]).mean()), "bigram": float(-np.log(bigram).mean())}


def _pairs(shards: Sequence[np.ndarray], vocab_size: int) -> np.ndarray:
    """Return each pair of adjacent tokens (v, w) as one number, v * V + w: [N] int64."""
    parts = [shard.astype(np.int64) for shard in shards]
    return np.concatenate([part[:-1] * vocab_size + part[1:] for part in parts])
