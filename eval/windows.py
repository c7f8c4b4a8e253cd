"""Divide a text's tokens into windows that fit a model, with each token scored once."""

import itertools

from eval import EvalError
from eval.scoring import Request, Tokenizer, Tokens

# The window of models whose context has no limit.
DEFAULT_MAX_LENGTH = 1024


def start_token(tokenizer: Tokenizer) -> int:
    """Return the token that a text starts with: beginning-of-text, or end-of-text as in GPT-2. Raises EvalError."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise EvalError("the tokenizer has no beginning- or end-of-text token to start a text with; set one")
    return start


def windows(num_tokens: int, max_length: int, stride: int) -> list[tuple[int, int]]:
    """Return the (start, stop) of the tokens that each window scores, counted from the first scored token."""
    edges = [0, *range(min(max_length, num_tokens), num_tokens, stride), num_tokens]
    return list(itertools.pairwise(edges)) if num_tokens > 0 else []


def rolling_requests(tokens: Tokens, max_length: int, stride: int) -> list[Request]:
    """Score all tokens but the first. Each window's last token has as many tokens before it as fit.

    With a stride of `max_length`, these are the windows of lm-evaluation-harness (utils.py,
    `get_rolling_token_windows`).
    """
    return [
        Request(tokens[max(0, stop - max_length) : start + 1], [tokens[start + 1 : stop + 1]])
        for start, stop in windows(len(tokens) - 1, max_length, stride)
    ]


def strided_requests(tokens: Tokens, max_length: int, stride: int) -> list[Request]:
    """Score windows that begin every `stride` tokens, each without the tokens that an earlier one has scored.

    Windows of transformers' page on perplexity (https://huggingface.co/docs/transformers/perplexity). The first token
    of a window is never scored, so a stride of `max_length` leaves out one token per window.
    """
    requests, stop = [], 0
    for begin in range(0, len(tokens), stride):
        first, stop = max(stop, begin + 1), min(begin + max_length, len(tokens))
        if first < stop:
            requests.append(Request(tokens[begin:first], [tokens[first:stop]]))
        if stop == len(tokens):
            break
    return requests
