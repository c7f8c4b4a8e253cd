"""How well counting alone predicts a corpus: the losses that a language model must beat to have learned more."""

import numpy as np

from data import DataError
from data.tokenizer import VOCAB_SIZE


def ngram_baselines(train, val, vocab_size=VOCAB_SIZE):
    """
    Cross-entropy of the validation tokens under a unigram and a bigram model of the training tokens.

    The unigram is add-one smoothed. The bigram is interpolated absolute discounting over that unigram, with the
    discount n1 / (n1 + 2 n2) (Ney, Essen and Kneser 1994; Chen and Goodman 1999, section 2.6): a strong one, since a
    weak baseline would prove nothing.

        p(w | v) = max(c(v, w) - D, 0) / c(v) + D t(v) / c(v) * p(w)      t(v): different words seen after v
        p(w | v) = p(w)                                                  where v was never followed by anything

    Args:
        train, val: lists of data.shards.Shard, or of [N] integer arrays. Pairs do not cross shards.

    Returns:
        {"unigram": nats a token, "bigram": nats a token}, both over every validation token that has one before it.

    Raises:
        DataError: a split without two neighbouring tokens, or with an id that GPT-2 does not have.
    """
    for split, shards in (("train", train), ("val", val)):
        if not any(len(shard) > 1 for shard in shards):
            raise DataError(f"the {split} split has no two neighbouring tokens to count; give more text")
    train, val = ([shard[:] for shard in shards] for shards in (train, val))
    counts = np.bincount(np.concatenate(train), minlength=vocab_size)
    unigram = (counts + 1) / (counts.sum() + vocab_size)  # [V]

    keys, pair_counts = np.unique(_pairs(train, vocab_size), return_counts=True)
    n1, n2 = (pair_counts == 1).sum(), (pair_counts == 2).sum()
    discount = n1 / (n1 + 2 * n2) if n1 else 0.5  # no pair seen once: a toy corpus, any discount will do
    first = keys // vocab_size
    followers = np.bincount(first, weights=pair_counts, minlength=vocab_size)  # c(v)
    kinds = np.bincount(first, minlength=vocab_size)  # t(v)

    asked = _pairs(val, vocab_size)
    v, w = asked // vocab_size, asked % vocab_size
    place = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    seen = np.where(keys[place] == asked, pair_counts[place], 0)
    total = np.maximum(followers[v], 1)
    backoff = np.where(followers[v] > 0, discount * kinds[v] / total, 1.0)
    bigram = np.maximum(seen - discount, 0) / total + backoff * unigram[w]
    return {"unigram": float(-np.log(unigram[w]).mean()), "bigram": float(-np.log(bigram).mean())}


def _pairs(shards, vocab_size):
    """Neighbours as one number each, v * V + w, int64."""
    parts = [np.asarray(shard, dtype=np.int64) for shard in shards]
    return np.concatenate([part[:-1] * vocab_size + part[1:] for part in parts])
