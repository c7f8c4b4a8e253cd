"""
How probable a model finds continuations of a context, for many contexts at once.

A causal model's logit at position t scores the token at t + 1, and the last token of a continuation is never an
input. The continuations of one context share it: one row holds the context once, and behind it each continuation,
which sees the context and itself. Context c0 c1 c2 with the continuations k0 k1 k2 and m0 m1:

    input          c0   c1   c2   k0   k1   m0   pad         (right-padded to the longest row of the batch)
    position        0    1    2    3    4    3
    logit scores    -    -   k0   k1   k2   m1
                            m0
    attends to     c0 ... itself  c0 c1 c2 k0 k1   c0 c1 c2 m0

so that every token has the numbers that it would have in a sequence of its own: in one row of 6 inputs here, instead
of two of 5 and 4. Rows are batched by length, and only positions that score something become logits.
"""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from eval import EvalError

# Models that are known to take such rows, through SDPA's mask. Any other gets each continuation in a row of its own.
SHARING_MODELS = ("gpt2", "gpt2repro")

# Inputs (padding included) of one forward pass, by device type: a GPU wants enough to be busy, a CPU as little as
# fills its matmuls, since what is larger leaves its caches (benchmarks/LOG.md).
TOKENS_PER_BATCH = {"cpu": 1024, None: 32_768}
# The same where the model's own forward makes logits of every input behind the first that scores something: numbers.
LOGITS_PER_BATCH = {"cpu": 2**25, None: 2**28}
# Rows of the head's matrix that make logits at a time. On a CPU these stay in its cache, and the matmul is faster.
VOCABULARY_SLAB = {"cpu": 1024, None: 4096}


class Request(NamedTuple):
    """What to score."""

    context: Sequence[int]
    """token ids, one or more: a list or an array"""
    continuations: list[Sequence[int]]
    """token ids of each continuation, one or more"""


class ContinuationScore(NamedTuple):
    """The answer for one continuation."""

    log_likelihoods: np.ndarray
    """[tokens of the continuation] float32: ln p(token | everything before it), in nats"""
    is_greedy: bool
    """whether each of its tokens is the most probable one in its place"""
    num_cut: int
    """tokens of the context that did not fit the model and were cut on the left"""

    @property
    def log_likelihood(self):
        """The sum over the tokens, nats."""
        return float(self.log_likelihoods.sum(dtype=np.float64))

    @property
    def num_tokens(self):
        return len(self.log_likelihoods)


class _Row(NamedTuple):
    request: int
    numbers: list[int]  # of the continuations among the request's
    context: Sequence[int]  # cut to fit
    continuations: list[Sequence[int]]
    num_cut: int

    @property
    def num_inputs(self):
        return len(self.context) + sum(len(tokens) - 1 for tokens in self.continuations)


@torch.no_grad()  # not inference_mode: parameters gathered under it (FSDP) could not be trained on afterwards
def loglikelihoods(model, requests, *, tokens_per_batch=None, on_batch=None):
    """
    Log-likelihood of each continuation given its context, in nats, computed from float32 logits.

    A context and continuation longer than the model's context lose their leftmost tokens, as in
    lm-evaluation-harness. The model is put in eval mode for the while. An autocast around the call is respected.

    Args:
        model: a causal language model of transformers' kind: `config`, and
            `model(input_ids, attention_mask=, use_cache=, logits_to_keep=).logits` of [B, T, V].
        requests: list of Request.
        tokens_per_batch: inputs in one forward pass, padding included; by default what suits the device. The results
            do not depend on it, up to rounding.
        on_batch: called after each batch with the number of continuations in it, for a progress bar.

    Returns:
        list of one list a request, in order: a ContinuationScore a continuation, in order.

    Raises:
        EvalError: an empty context or continuation, a token id outside the vocabulary, a continuation that
            does not fit the model's context, a result that is not finite, tokens_per_batch below 1.
    """
    model = getattr(model, "_orig_mod", model)  # compiled, each batch's shape would be compiled anew
    device = next(model.parameters()).device
    shares_context = _can_share_context(model)
    vocab_size, max_inputs = vocabulary_of(model.config), context_of(model.config)
    if tokens_per_batch is None:
        tokens_per_batch = _by_device(TOKENS_PER_BATCH, device)
        if not shares_context:
            tokens_per_batch = max(1, _by_device(LOGITS_PER_BATCH, device) // vocab_size)
    if tokens_per_batch < 1:
        raise EvalError(f"tokens_per_batch must be at least 1, got {tokens_per_batch}")
    rows = []
    for number, request in enumerate(requests):
        rows += _rows(vocab_size, max_inputs, number, request, shares_context)
    # Neighbours of similar length waste little on padding; longest first, so that what does not fit in memory
    # fails at once rather than at the end.
    rows.sort(key=lambda row: -row.num_inputs)
    scores = [[None] * len(request.continuations) for request in requests]
    with in_eval_mode(model):
        for batch in _batches(rows, tokens_per_batch):
            of_continuations = iter(_score_batch(model, batch, device, shares_context))
            for row in batch:
                for number in row.numbers:
                    scores[row.request][number] = ContinuationScore(*next(of_continuations), row.num_cut)
            if on_batch is not None:
                on_batch(sum(len(row.numbers) for row in batch))
    return scores


@contextlib.contextmanager
def in_eval_mode(model):
    """While it lasts, the model is in eval mode; then each of its modules is again in the mode that it was in."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in was_training.items():
            module.training = mode


def _can_share_context(model):
    """Whether it is one of SHARING_MODELS as it was made: adapters, quantisation, offloading change what is called."""
    config = model.config
    if getattr(config, "model_type", None) not in SHARING_MODELS or config._attn_implementation != "sdpa":
        return False
    head = model.get_output_embeddings()
    # By name: a checkpoint's own code (trust_remote_code) has a class of its own.
    is_linear = type(head) is nn.Linear or type(head).__name__ == "LanguageModelHead"
    return (
        getattr(model, model.base_model_prefix) is model.base_model
        and is_linear
        and head.bias is None
        and head.weight.device.type != "meta"
    )


def _by_device(sizes, device):
    return sizes.get(device.type, sizes[None])


def vocabulary_of(config):
    """Tokens that a model knows; of the text, where it knows more than that."""
    return (config.get_text_config() if hasattr(config, "get_text_config") else config).vocab_size


def context_of(config):
    """Inputs that fit a model; None where there is no limit (ALiBi, recurrence), which XLNet says with -1."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(config, "max_position_embeddings", None)
    return longest if longest is not None and longest > 0 else None


def _rows(vocab_size, max_inputs, number, request, shares_context):
    """The rows of one request: as few as its continuations fit into, one each where contexts are not shared."""
    context, continuations = request
    if len(context) == 0 or not continuations or min(map(len, continuations)) == 0:
        what = "context" if len(context) == 0 else "continuation"
        raise EvalError(f"request {number}: the {what} has no tokens; there must be at least one")
    every = np.concatenate([context, *continuations])
    if not 0 <= every.min() <= every.max() < vocab_size:
        raise EvalError(
            f"request {number}: token ids {every.min()} to {every.max()} do not fit the model's vocabulary of "
            f"{vocab_size}; use the tokenizer that the model was trained with"
        )
    max_inputs = max_inputs or len(every)
    rows = []
    for index, tokens in enumerate(continuations):
        if len(tokens) > max_inputs:
            raise EvalError(
                f"request {number}: a continuation of {len(tokens)} tokens does not fit the model's context "
                f"of {max_inputs}"
            )
        num_cut = max(0, len(context) + len(tokens) - 1 - max_inputs)
        last = rows[-1] if rows and shares_context else None
        if last and last.num_cut == num_cut and last.num_inputs + len(tokens) - 1 <= max_inputs:
            last.numbers.append(index)
            last.continuations.append(tokens)
        else:
            rows.append(_Row(number, [index], context[num_cut:], [tokens], num_cut))
    return rows


def _batches(rows, tokens_per_batch):
    """Rows, longest first, in lists that are as long as the budget allows."""
    start = 0
    while start < len(rows):
        size = max(1, tokens_per_batch // rows[start].num_inputs)
        yield rows[start : start + size]
        start += size


def _score_batch(model, rows, device, shares_context):
    """(log-likelihoods of the tokens, is_greedy) of each continuation, row after row."""
    length = max(row.num_inputs for row in rows)
    # Padding is a segment of its own with token 0: nothing attends to it, and it has what to attend to.
    input_ids, positions, segments = np.zeros((3, len(rows), length), dtype=np.int64)  # [B, T] each
    segments[:] = -1
    positions[:] = np.arange(length)  # of padding too: positions that begin again would mean packed documents
    places, targets, counts = [], [], []  # of every scored token: its logit's place in [B * T], and which token it is
    for i, row in enumerate(rows):
        num_context = end = len(row.context)
        input_ids[i, :end], segments[i, :end] = row.context, 0
        for number, tokens in enumerate(row.continuations, start=1):
            own = slice(end, end := end + len(tokens) - 1)
            input_ids[i, own] = tokens[:-1]
            positions[i, own] = np.arange(num_context, num_context + len(tokens) - 1)
            segments[i, own] = number
            places += [i * length + num_context - 1, *range(i * length + own.start, i * length + own.stop)]
            targets += list(tokens)
            counts.append(len(tokens))
    input_ids, positions, segments = (torch.from_numpy(x).to(device) for x in (input_ids, positions, segments))
    places, targets = (torch.tensor(x, dtype=torch.long, device=device) for x in (places, targets))
    if shares_context:
        log_likelihoods, are_greedy = _shared_context_pass(model, input_ids, positions, segments, places, targets)
    else:
        log_likelihoods, are_greedy = _plain_pass(model, input_ids, segments >= 0, places, targets)
    log_likelihoods, are_greedy = log_likelihoods.cpu(), are_greedy.cpu()
    if not log_likelihoods.isfinite().all():
        raise EvalError(
            "the model's log-likelihoods are not finite: its weights are broken (diverged training?), or the "
            "numbers too large for its dtype"
        )
    ends = np.cumsum(counts)[:-1]
    return [
        (of_tokens, bool(greedy.all()))
        for of_tokens, greedy in zip(
            np.split(log_likelihoods.float().numpy(), ends), np.split(are_greedy.numpy(), ends), strict=True
        )
    ]


def _shared_context_pass(model, input_ids, positions, segments, places, targets):
    """(ln p [N] float32, is the most probable [N]) of the targets at these places."""
    mask = None  # where no row has two continuations: plain causal attention, the fast kernel's own
    if (segments > 1).any():
        is_visible = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
        mask = is_visible.tril()[:, None]  # [B, 1, T, T], True: attend
    output = model.base_model(input_ids, attention_mask=mask, position_ids=positions, use_cache=False)
    hidden = output.last_hidden_state.flatten(0, 1)[places]
    return _head_scores(model.get_output_embeddings(), hidden, targets)


def _head_scores(head, hidden, targets):
    """The same from the last hidden states [N, D], a slab of the vocabulary at a time."""
    size = _by_device(VOCABULARY_SLAB, hidden.device)
    log_normalizer = best = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
    chosen, is_first_best = torch.empty_like(best), torch.zeros_like(targets, dtype=torch.bool)
    for first in range(0, head.out_features, size):
        logits = F.linear(hidden, head.weight[first : first + size]).float()
        log_normalizer = torch.logaddexp(log_normalizer, logits.logsumexp(-1))
        best_here = logits.amax(-1)
        is_here = (first <= targets) & (targets < first + size)
        own_logits, own_targets = logits[is_here], targets[is_here] - first
        chosen[is_here] = own_logits.gather(-1, own_targets[:, None])[:, 0]
        # Of equally probable tokens the first is the greedy one; argmax is slow, and few rows have their target here.
        is_first_best[is_here] = (own_logits.argmax(-1) == own_targets) & (best_here > best)[is_here]
        best = torch.maximum(best, best_here)
    return chosen - log_normalizer, is_first_best & (chosen >= best)


def _plain_pass(model, input_ids, is_token, places, targets):
    """The same from any causal language model's own forward."""
    length = input_ids.shape[1]
    columns = places % length - length  # from the end, where they are the same in all logits and in the last few
    logits = model(
        input_ids, attention_mask=is_token.long(), use_cache=False, logits_to_keep=-columns.min().item()
    ).logits
    logits = logits[places // length, columns].float()
    chosen = logits.gather(-1, targets[:, None])[:, 0]
    return chosen - logits.logsumexp(-1), logits.argmax(-1) == targets
