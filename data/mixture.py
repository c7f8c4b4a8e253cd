"""Mixtures: every step takes its windows from several folders of shards, in the proportions of their weights.

With a batch of B windows and weights w_1, ..., w_m that add up to 1, let C_j = B (w_1 + ... + w_j). At step s, source j
gets as many windows as there are integers i with C_{j-1} <= u + i < C_j, for u = s g mod 1 and g the golden ratio
(systematic sampling: Madow 1949). So a source gets B w_j windows, rounded up or down, at every step; and since the u of
consecutive steps fill [0, 1) evenly, the rounding averages out.

The numbers are exact fractions, which are the same on every machine.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any

from data import DataError
from data.manifest import dataset_fingerprint

_GOLDEN = (1134903170, 1836311903)  # two Fibonacci numbers, whose ratio is the golden ratio's to 18 digits


def normalize(weights: Sequence[float]) -> list[Fraction]:
    """Return the exact shares of weights, taken as the decimal numbers that they were written as: 0.7 is 7/10."""
    exact = [Fraction(repr(weight)) for weight in weights]
    return [weight / sum(exact) for weight in exact]


class Shares:
    """The numbers of windows that the sources of a mixture contribute to each step.

    Args:
        weights: positive; only their proportions matter.
        batch_size: B, windows per step.
    """

    def __init__(self, weights: Sequence[float], batch_size: int) -> None:
        self._bounds = [batch_size * share for share in accumulate(normalize(weights), initial=Fraction(0))]  # C_j

    def windows_before(self, step: int) -> list[int]:
        """Return the number of windows of each source in all steps before this one."""
        p, q = _GOLDEN
        # At step s, source j gets floor(s p/q - C_{j-1}) - floor(s p/q - C_j) windows.
        sums = [floor_sum(step, q * C.denominator, p * C.denominator, -q * C.numerator) for C in self._bounds]
        return [previous - current for previous, current in pairwise(sums)]


def floor_sum(n: int, m: int, a: int, b: int) -> int:
    """Return the sum of floor((a i + b) / m) over i = 0 ... n - 1, in O(log m) operations, like Euclid's algorithm."""
    total = 0
    while n:
        slope, a = divmod(a, m)
        offset, b = divmod(b, m)
        total += n * (n - 1) // 2 * slope + n * offset
        n, b = divmod(a * n + b, m)  # count the points under the line by rows instead of columns
        m, a = a, m
    return total


def mixture_fingerprint(mix: Mapping[str, float]) -> dict[str, Any]:
    """Describe the data of a run, with the weight of each folder. For one folder, this is `dataset_fingerprint`.

    For several, the same keys: train_tokens, val_tokens and shards are sums, and train_sha256 changes with the content
    or the order of the folders, but not with their names. Also mix_weights, which add up to 1, and sources, {folder:
    its fingerprint and "weight"}. Raises DataError if the folders were not made with the same tokenizer.
    """
    fingerprints = {folder: dataset_fingerprint(folder) for folder in mix}
    if len(mix) == 1:
        return next(iter(fingerprints.values()))
    first, *others = mix
    for folder in others:
        if fingerprints[folder]["tokenizer_sha256"] != fingerprints[first]["tokenizer_sha256"]:
            raise DataError(f"data.mix: {first} and {folder} were made with different tokenizers; prepare one again")
    weights = [float(share) for share in normalize([*mix.values()])]
    contents = [[fingerprint[key] for key in ("train_tokens", "train_sha256")] for fingerprint in fingerprints.values()]
    return {
        **{key: sum(f[key] for f in fingerprints.values()) for key in ("train_tokens", "val_tokens", "shards")},
        "manifest_sha256": None,
        "train_sha256": hashlib.sha256(json.dumps(contents).encode()).hexdigest(),
        "source": None,
        **{key: fingerprints[first][key] for key in ("tokenizer", "tokenizer_sha256", "vocab_size")},
        "mix_weights": weights,
        "sources": {
            folder: {"weight": weight, **fingerprint}
            for (folder, fingerprint), weight in zip(fingerprints.items(), weights, strict=True)
        },
    }
