"""
HellaSwag's accuracies, from the endings' log-likelihoods.

`evaluate` copies this file beside the metric: it imports nothing of this project.
"""

import math

import numpy as np


def accuracy(predictions, references):
    """
    Two ways to choose an ending: by its log-likelihood (acc), and by its log-likelihood over its length (acc_norm).
    With lengths in tokens that is build-nanogpt's and llm.c's number (0.2955 for OpenAI's 124M), in characters
    lm-evaluation-harness's (0.3114, with its own prompt). The first of equals is chosen.

    Args:
        predictions: list of one dict an item, with equally many entries an ending in
            "log_likelihoods" (floats, summed over the ending's tokens, nats) and "lengths" (ints).
        references: list of ints, the right ending of each item, counted from 0.

    Returns:
        dict: acc, acc_norm (fractions of n), acc_stderr, acc_norm_stderr (their standard errors,
        sqrt(p (1 - p) / (n - 1)) as in lm-evaluation-harness; nan for one item), n (items).

    Raises:
        ValueError: nothing to count, lists of different lengths, endings that differ in number, an ending
            of no length, a log-likelihood that is not a number, a label that is no ending.
    """
    by_sum, by_mean = _correct(predictions, references)
    n = len(by_sum)
    result = {}
    for name, is_correct in (("acc", by_sum), ("acc_norm", by_mean)):
        p = float(is_correct.mean())
        result[name] = p
        result[f"{name}_stderr"] = math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else math.nan
    result["n"] = n
    return result


def _correct(predictions, references):
    """Which items are right, two boolean arrays [n]: by log-likelihood, and by log-likelihood over length."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references; give one each")
    if len(predictions) == 0:
        raise ValueError("no predictions: there must be at least one item")
    by_sum, by_mean = [], []
    for index, (prediction, label) in enumerate(zip(predictions, references, strict=True)):
        sums = np.asarray(prediction["log_likelihoods"], dtype=np.float64)
        lengths = np.asarray(prediction["lengths"])
        if sums.ndim != 1 or sums.shape != lengths.shape or len(sums) < 2:
            raise ValueError(
                f"item {index}: {sums.size} log_likelihoods and {lengths.size} lengths; give one of each "
                "for every ending, of which there must be two or more"
            )
        num_endings = len(predictions[0]["log_likelihoods"])
        if len(sums) != num_endings:
            raise ValueError(f"item {index}: {len(sums)} endings, item 0 has {num_endings}; all need as many")
        if not (lengths > 0).all():
            raise ValueError(f"item {index}: lengths {lengths.tolist()}; every ending has one or more")
        if np.isnan(sums).any():
            raise ValueError(f"item {index}: log_likelihoods {sums.tolist()} are not all numbers")
        if not 0 <= label < len(sums):
            raise ValueError(f"item {index}: label {label} is none of the endings 0 to {len(sums) - 1}")
        by_sum.append(np.argmax(sums) == label)
        by_mean.append(np.argmax(sums / lengths) == label)
    return np.array(by_sum), np.array(by_mean)
