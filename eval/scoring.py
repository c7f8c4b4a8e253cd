"""
How probable a model finds a continuation after a context, for many pairs at once.

A causal model's logit at position t scores the token at t + 1, and the last token is never an input:

    tokens        c0   c1   c2   k0   k1           context c0 c1 c2, continuation k0 k1
    input         c0   c1   c2   k0   pad  pad     (right-padded to the longest of the batch)
    logit at       0    1    2    3    4    5
    scores        c1   c2   k0   k1    -    -
                            `--------' the sum of these log-probabilities is the result

Nothing to the left can see padding on the right, so a batch gives what its sequences would give one by one.
"""

from typing import NamedTuple

import torch

from eval import EvalError


class ContinuationScore(NamedTuple):
    """The answer to one request of `loglikelihoods`."""

    log_likelihood: float
    """sum of ln p(token | everything before it) over the continuation's tokens"""
    num_tokens: int
    """tokens in the continuation"""
    num_cut: int
    """tokens of the context that did not fit the model and were cut on the left"""


class _Row(NamedTuple):
    tokens: list[int]  # context and continuation, cut to fit
    num_scored: int
    num_cut: int

    @property
    def num_inputs(self):
        return len(self.tokens) - 1


@torch.no_grad()  # not inference_mode: parameters gathered under it (FSDP) could not be trained on afterwards
def loglikelihoods(model, requests, *, batch_size, on_batch=None):
    """
    Log-likelihood of each continuation given its context, in nats, computed from float32 logits.

    A sequence longer than the model's context loses its leftmost tokens, as in lm-evaluation-harness. The
    model is put in eval mode for the while. An autocast around the call is respected.

    Args:
        model: a causal language model of transformers' kind: `config`, and
            `model(input_ids, attention_mask=, use_cache=, logits_to_keep=).logits` of [B, T, V].
        requests: list of (context, continuation), two lists of token ids.
        batch_size: sequences in one forward pass. The results do not depend on it, up to rounding.
        on_batch: called after each batch with its list of ContinuationScore, for a progress bar.

    Returns:
        list of ContinuationScore, in the order of `requests`.

    Raises:
        EvalError: an empty context or continuation, a token id outside the vocabulary, a continuation that
            does not fit the model's context, a result that is not finite, a batch_size below 1.
    """
    if batch_size < 1:
        raise EvalError(f"batch_size must be at least 1, got {batch_size}")
    rows = [_row(model.config, index, *request) for index, request in enumerate(requests)]
    # Neighbours of similar length waste little on padding; longest first, so that what does not fit in memory
    # fails at once rather than at the end.
    order = sorted(range(len(rows)), key=lambda index: -rows[index].num_inputs)
    scores = [None] * len(rows)
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            for index, value in zip(batch, _score_batch(model, [rows[i] for i in batch]), strict=True):
                scores[index] = ContinuationScore(value, rows[index].num_scored, rows[index].num_cut)
            if on_batch is not None:
                on_batch([scores[index] for index in batch])
    finally:
        for module, mode in was_training.items():
            module.training = mode
    return scores


def _row(config, index, context, continuation):
    if not context or not continuation:
        empty = "context" if not context else "continuation"
        raise EvalError(f"request {index}: the {empty} has no tokens; there must be at least one")
    tokens = [*context, *continuation]
    if not 0 <= min(tokens) <= max(tokens) < config.vocab_size:
        raise EvalError(
            f"request {index}: token ids {min(tokens)} to {max(tokens)} do not fit the model's vocabulary of "
            f"{config.vocab_size}; use the tokenizer that the model was trained with"
        )
    # Models without position embeddings (ALiBi) name no limit.
    max_inputs = getattr(config, "max_position_embeddings", None) or len(tokens)
    if len(continuation) > max_inputs:
        raise EvalError(
            f"request {index}: a continuation of {len(continuation)} tokens does not fit the model's context "
            f"of {max_inputs}"
        )
    num_cut = max(0, len(tokens) - 1 - max_inputs)
    return _Row(tokens[num_cut:], len(continuation), num_cut)


def _score_batch(model, rows):
    """Summed log-probability of each row's last `num_scored` tokens, list of float."""
    length = max(row.num_inputs for row in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)  # [B, T]; any id will do as padding
    attention_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, : row.num_inputs] = torch.tensor(row.tokens[:-1])
        attention_mask[i, : row.num_inputs] = 1
    # One entry for each scored token, row after row: where its logit stands, and which token it is.
    counts = [row.num_scored for row in rows]
    sequence = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts))
    position = torch.cat([torch.arange(row.num_inputs - row.num_scored, row.num_inputs) for row in rows])
    target = torch.cat([torch.tensor(row.tokens[-row.num_scored :]) for row in rows])
    # Counted from the end, where they are the same in all logits and in the last few.
    position -= length

    device = next(model.parameters()).device
    logits = model(
        input_ids.to(device),
        attention_mask=attention_mask.to(device),
        use_cache=False,
        logits_to_keep=-position.min().item(),
    ).logits
    logits = logits[sequence.to(device), position.to(device)].float()  # [scored tokens, V]
    token_log_probs = logits.log_softmax(-1).gather(-1, target.to(device).unsqueeze(-1)).squeeze(-1)
    sums = [chunk.sum().item() for chunk in token_log_probs.cpu().double().split(counts)]
    if not torch.tensor(sums).isfinite().all():
        raise EvalError(
            "the model's log-likelihoods are not finite: its weights are broken (diverged training?), or the "
            "numbers too large for its dtype"
        )
    return sums
