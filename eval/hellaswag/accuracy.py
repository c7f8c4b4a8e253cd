"""HellaSwag's accuracies, from the endings' log-likelihoods.

`evaluate` copies this file along with the metric, so it imports nothing from this project.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def accuracy(predictions: Sequence[dict[str, Any]], references: Sequence[int]) -> dict[str, float]:
    """Compute the accuracy of choosing by log-likelihood (acc), and by log-likelihood over length (acc_norm).

    With lengths in tokens, acc_norm is build-nanogpt's and llm.c's number (0.2955 for OpenAI's 124M); in characters,
    lm-evaluation-harness's (0.3114, with its own prompt). The first of several equal endings is chosen.

    Args:
        predictions: one dict per item: "log_likelihoods", each ending's log-likelihood in nats, summed over its
            tokens; "lengths", the divisors for acc_norm: each ending's number of tokens or characters.
        references: the index of each item's correct ending, from 0.

    Returns:
        acc, acc_norm (fractions of n), acc_stderr, acc_norm_stderr (their standard errors,
        sqrt(p (1 - p) / (n - 1)) as in lm-evaluation-harness; nan for one item), n (items).

    Raises:
        ValueError: no items, lists of different lengths, items with different numbers of endings, a length below 1,
            a log-likelihood that is nan, a label that is not the index of an ending.

    Example:
        >>> hellaswag = evaluate.load("eval/hellaswag")
        >>> hellaswag.compute(
        ...     predictions=[
        ...         {"log_likelihoods": [-4.0, -9.0, -9.0, -6.0], "lengths": [1, 3, 3, 3]},
        ...         {"log_likelihoods": [-9.0, -5.0, -9.0, -9.0], "lengths": [3, 3, 3, 3]},
        ...     ],
        ...     references=[3, 1],
        ... )
        {'acc': 0.5, 'acc_stderr': 0.5, 'acc_norm': 1.0, 'acc_norm_stderr': 0.0, 'n': 2}
    """
    if len(predictions) != len(references):
        raise ValueError(f"got {len(predictions)} predictions for {len(references)} references; give one each")
    if len(predictions) == 0:
        raise ValueError("no predictions: there must be at least one item")
    correct: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for index, (prediction, label) in enumerate(zip(predictions, references, strict=True)):
        sums = np.asarray(prediction["log_likelihoods"], dtype=np.float64)
        lengths = np.asarray(prediction["lengths"])
        if sums.ndim != 1 or sums.shape != lengths.shape or len(sums) < 2:
            raise ValueError(
                f"item {index}: {sums.size} log_likelihoods and {lengths.size} lengths; give one of each "
                "for every ending, and at least two endings"
            )
        num_endings = len(predictions[0]["log_likelihoods"])
        if len(sums) != num_endings:
            raise ValueError(f"item {index}: {len(sums)} endings, but item 0 has {num_endings}; give the same number")
        if not (lengths > 0).all():
            raise ValueError(f"item {index}: lengths must be at least 1, got {lengths.tolist()}")
        if np.isnan(sums).any():
            raise ValueError(f"item {index}: log_likelihoods must be numbers, got {sums.tolist()}")
        if not 0 <= label < len(sums):
            raise ValueError(f"item {index}: label must be between 0 and {len(sums) - 1}, got {label}")
        correct["acc"].append(bool(np.argmax(sums) == label))
        correct["acc_norm"].append(bool(np.argmax(sums / lengths) == label))
    n = len(predictions)
    result = {}
    for name, is_correct in correct.items():
        p = sum(is_correct) / n
        result[name] = p
        result[f"{name}_stderr"] = math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else math.nan
    return result | {"n": n}
