"""
LAMBADA's accuracy and perplexity, from the last words' log-likelihoods.

`evaluate` copies this file beside the metric: it imports nothing of this project.
"""

import math

import numpy as np


def word_prediction(predictions):
    """
    As lm-evaluation-harness has them (tasks/lambada, version 1).

    Args:
        predictions: list of one dict a passage: "log_likelihood" (float, of the last word, summed over its tokens,
            nats) and "is_greedy" (whether each of its tokens is the most probable one).

    Returns:
        dict: acc (the fraction that is greedy), acc_stderr (sqrt(p (1 - p) / (n - 1))), perplexity (of a word:
        exp of minus the mean), perplexity_stderr (perplexity times the standard error of that mean), n; the standard
        errors are nan for one passage.

    Raises:
        ValueError: nothing to count, a log-likelihood that is above 0 or no number.
    """
    if len(predictions) == 0:
        raise ValueError("no predictions: there must be at least one passage")
    values = np.array([prediction["log_likelihood"] for prediction in predictions], dtype=np.float64)
    for index, value in enumerate(values.tolist()):
        if not value <= 0:
            raise ValueError(f"passage {index}: log_likelihood {value}; the logarithm of a probability is 0 or less")
    n = len(values)
    acc = sum(bool(prediction["is_greedy"]) for prediction in predictions) / n
    perplexity = math.exp(min(-values.mean(), 700.0))  # e^709 is the largest float
    return {
        "acc": acc,
        "acc_stderr": math.sqrt(acc * (1 - acc) / (n - 1)) if n > 1 else math.nan,
        "perplexity": perplexity,
        "perplexity_stderr": perplexity * float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan,
        "n": n,
    }
