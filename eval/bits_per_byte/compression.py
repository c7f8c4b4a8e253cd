"""
Bits per byte, from texts' log-likelihoods.

`evaluate` copies this file beside the metric: it imports nothing of this project.
"""

import math


def bits_per_byte(log_likelihoods, num_bytes):
    """
    What a text costs where the model's probabilities are its code, in bits, over the bytes that it has: below 8 the
    model compresses. A token's loss can be compared between models of one tokenizer only, this between any.

    Args:
        log_likelihoods: list of float, a text's each, nats.
        num_bytes: list of int, how many bytes of UTF-8 each of them has.

    Returns:
        float: - sum of the log-likelihoods / (ln 2 * sum of the bytes)

    Raises:
        ValueError: nothing to count, lists of different lengths, a log-likelihood above 0 or no number, no bytes.
    """
    if len(log_likelihoods) != len(num_bytes) or not log_likelihoods:
        raise ValueError(
            f"{len(log_likelihoods)} log-likelihoods for {len(num_bytes)} texts; give one each, for one or more"
        )
    for index, value in enumerate(log_likelihoods):
        if not value <= 0:
            raise ValueError(f"text {index}: log-likelihood {value}; the logarithm of a probability is 0 or less")
    total = sum(num_bytes)
    if total <= 0:
        raise ValueError("the texts are empty: bits per byte need a byte")
    return -math.fsum(log_likelihoods) / (math.log(2) * total)
