import itertools
import math
from collections import Counter

import numpy as np
import pytest

from data.ngram import ngram_baselines

RNG = np.random.RandomState(0)
V = 12
TRAIN = [np.minimum(RNG.geometric(0.3, 300), V - 1).astype(np.uint16), RNG.randint(0, 5, 50).astype(np.uint16)]
VAL = [RNG.randint(0, V, 80).astype(np.uint16), np.array([3], dtype=np.uint16)]


def slow_models():
    """The formulas of ngram_baselines' docstring over dictionaries."""
    words = Counter(int(t) for shard in TRAIN for t in shard)
    total = sum(words.values())
    pairs = Counter((int(a), int(b)) for shard in TRAIN for a, b in itertools.pairwise(shard))
    n1, n2 = (sum(count == n for count in pairs.values()) for n in (1, 2))
    discount = n1 / (n1 + 2 * n2)

    def unigram(w):
        return (words[w] + 1) / (total + V)

    def bigram(v, w):
        after = {b: count for (a, b), count in pairs.items() if a == v}
        if not after:
            return unigram(w)
        c = sum(after.values())
        return max(after.get(w, 0) - discount, 0) / c + discount * len(after) / c * unigram(w)

    return unigram, bigram


def test_losses_equal_a_slow_count():
    unigram, bigram = slow_models()
    for v in range(V):
        assert sum(bigram(v, w) for w in range(V)) == pytest.approx(1)
    pairs = [(int(a), int(b)) for shard in VAL for a, b in itertools.pairwise(shard)]
    result = ngram_baselines(TRAIN, VAL, vocab_size=V)
    assert result["unigram"] == pytest.approx(-sum(math.log(unigram(w)) for _, w in pairs) / len(pairs))
    assert result["bigram"] == pytest.approx(-sum(math.log(bigram(v, w)) for v, w in pairs) / len(pairs))


def test_bigram_predicts_a_cycle_and_unigram_does_not():
    train = [np.tile(np.arange(4, dtype=np.uint16), 100)]
    result = ngram_baselines(train, [np.tile(np.arange(4, dtype=np.uint16), 10)], vocab_size=4)
    assert result["unigram"] == pytest.approx(math.log(4), abs=0.01)
    assert result["bigram"] < 0.1
