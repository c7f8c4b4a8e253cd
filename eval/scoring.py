"""Log-likelihoods of continuations given a context, for many contexts at once.

A causal model's logit at position t scores the token at t + 1, and the last token of a continuation is never an
input. The continuations of one context share it: one row holds the context once, followed by each continuation,
which attends to the context and to itself. Context c0 c1 c2 with the continuations k0 k1 k2 and m0 m1:

    input          c0   c1   c2   k0   k1   m0   pad         (right-padded to the longest row of the batch)
    position        0    1    2    3    4    3
    logit scores    -    -   k0   k1   k2   m1
                            m0
    attends to     c0 ... itself  c0 c1 c2 k0 k1   c0 c1 c2 m0

Every token gets the log-likelihood that it would have in a sequence of its own, here with one row of 6 inputs instead
of two rows of 5 and 4. Rows are batched by length, and only positions that score something become logits.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eval import EvalError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Strings, so that training and `--help` do not wait for transformers to be imported here.
Config: TypeAlias = "PreTrainedConfig"
Model: TypeAlias = "PreTrainedModel"
Tokenizer: TypeAlias = "PreTrainedTokenizerBase"
Tokens: TypeAlias = Sequence[int] | np.ndarray

# Model types known to accept such rows, through SDPA's mask. For any other, each continuation gets its own row.
SHARING_MODELS = ("gpt2", "gpt2repro")

# Inputs (including padding) per forward pass, by device type: enough to keep a GPU busy, but on a CPU only as many as
# fill its matmuls, since larger batches do not fit its caches (benchmarks/LOG.md).
TOKENS_PER_BATCH: dict[str | None, int] = {"cpu": 1024, None: 32_768}
# Logits per forward pass, for models that compute them for every input after the first scored position.
LOGITS_PER_BATCH: dict[str | None, int] = {"cpu": 2**25, None: 2**28}
# Rows are padded to multiples of this length. GPU libraries plan a kernel for every new shape, so few shapes save time:
# on HellaSwag 16 instead of 92, for 4.6% more inputs (benchmarks/LOG.md).
LENGTH_MULTIPLE: dict[str | None, int] = {"cuda": 16, None: 1}
# Rows of the head's weight that are multiplied at a time. On a CPU a slab stays in the cache, which is faster.
VOCABULARY_SLAB: dict[str | None, int] = {"cpu": 1024, None: 4096}


class NotFiniteError(EvalError):
    """The model's log-likelihoods are not finite."""


class Request(NamedTuple):
    """A context and its continuations, to be scored."""

    context: Tokens
    """token ids, at least one"""
    continuations: Sequence[Tokens]
    """token ids of each continuation, at least one continuation of at least one token"""


class ContinuationScore(NamedTuple):
    """The score of one continuation."""

    log_likelihoods: np.ndarray
    """[num_tokens] float32: ln p(token | all tokens before it), in nats"""
    is_greedy: bool
    """True if each token is the most probable one at its position"""
    num_truncated: int
    """tokens removed from the left of the context because they did not fit the model"""

    @property
    def log_likelihood(self) -> float:
        """The sum over the tokens, in nats."""
        return float(self.log_likelihoods.sum(dtype=np.float64))

    @property
    def num_tokens(self) -> int:
        """The number of tokens in the continuation."""
        return len(self.log_likelihoods)


class _Row(NamedTuple):
    request: int
    indices: list[int]  # of the continuations, within the request
    context: Tokens  # truncated to fit
    continuations: list[Tokens]
    num_truncated: int

    @property
    def num_inputs(self) -> int:
        return len(self.context) + sum(len(tokens) - 1 for tokens in self.continuations)


@torch.no_grad()  # not inference_mode: parameters gathered under it (FSDP) could not be trained afterwards
def loglikelihoods(
    model: Model,
    requests: Sequence[Request],
    *,
    tokens_per_batch: int | None = None,
    on_batch: Callable[[int], object] | None = None,
) -> list[list[ContinuationScore]]:
    """Return, for each request, the log-likelihood of each continuation given its context, from float32 logits.

    A context and continuation that are longer than the model's context lose their leftmost tokens, as in
    lm-evaluation-harness. The model is in eval mode during the call. An autocast around the call is respected.

    Args:
        model: a causal language model with `config`, and
            `model(input_ids, attention_mask=, use_cache=, logits_to_keep=).logits` of shape [B, T, V].
        tokens_per_batch: inputs per forward pass, including padding; changes the results only by rounding.
        on_batch: called after each batch with the number of continuations in it.

    Raises:
        EvalError: an empty context or continuation, a token id outside the vocabulary, a continuation that
            does not fit the model's context, tokens_per_batch below 1.
        NotFiniteError: a result is not finite.
    """
    if not getattr(model.config, "is_causal", True):
        raise EvalError("the model has is_causal=False: its log-likelihoods of a text would have seen the text")
    model = getattr(model, "_orig_mod", model)  # a compiled model would be recompiled for each batch's shape
    device = next(model.parameters()).device
    shares_context = _can_share_context(model)
    vocab_size, max_length = vocab_size_of(model.config), max_length_of(model.config)
    if tokens_per_batch is None:
        tokens_per_batch = _by_device(TOKENS_PER_BATCH, device)
        if not shares_context:
            tokens_per_batch = max(1, _by_device(LOGITS_PER_BATCH, device) // vocab_size)
    if tokens_per_batch < 1:
        raise EvalError(f"tokens_per_batch must be at least 1, got {tokens_per_batch}")
    rows: list[_Row] = []
    for index, request in enumerate(requests):
        rows += _make_rows(vocab_size, max_length, index, request, shares_context)
    # Rows of similar length need little padding. The longest come first, so that running out of memory happens at
    # the start rather than at the end.
    rows.sort(key=lambda row: -row.num_inputs)
    scores: list[list] = [[None] * len(request.continuations) for request in requests]
    with in_eval_mode(model):
        multiple = _by_device(LENGTH_MULTIPLE, device)
        for batch, length in _batches(rows, tokens_per_batch, multiple, max_length):
            batch_scores = iter(_score_batch(model, batch, length, device, shares_context))
            for row in batch:
                for index in row.indices:
                    log_likelihoods, is_greedy = next(batch_scores)
                    scores[row.request][index] = ContinuationScore(log_likelihoods, is_greedy, row.num_truncated)
            if on_batch is not None:
                on_batch(sum(len(row.indices) for row in batch))
    return scores


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode within the context, then restore the mode of each of its modules."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in was_training.items():
            module.training = mode


def _can_share_context(model: Model) -> bool:
    """Return True for unmodified SHARING_MODELS; adapters, quantization and offloading change what is called."""
    config = model.config
    if getattr(config, "model_type", None) not in SHARING_MODELS or config._attn_implementation != "sdpa":
        return False
    head = model.get_output_embeddings()
    # By name: a checkpoint's own code (trust_remote_code) has its own class.
    is_linear = type(head) is nn.Linear or type(head).__name__ == "LanguageModelHead"
    return (
        getattr(model, model.base_model_prefix) is model.base_model
        and is_linear
        and head.bias is None
        and head.weight.device.type != "meta"
    )


def _by_device(sizes: dict[str | None, int], device: torch.device) -> int:
    return sizes.get(device.type, sizes[None])


def _text_config(config: Config) -> Config:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def vocab_size_of(config: Config) -> int:
    """Return the model's vocabulary size; for multimodal models, that of the text model."""
    return _text_config(config).vocab_size


def max_length_of(config: Config) -> int | None:
    """Return the number of inputs that fit the model; None for no limit (ALiBi, recurrence; XLNet has -1)."""
    length = getattr(_text_config(config), "max_position_embeddings", None)
    return length if length is not None and length > 0 else None


def _make_rows(
    vocab_size: int, max_length: int | None, request_index: int, request: Request, shares_context: bool
) -> list[_Row]:
    """Return a request's rows: as few as its continuations fit into, or one each if contexts are not shared."""
    context, continuations = request
    if len(context) == 0 or not continuations or min(map(len, continuations)) == 0:
        what = "context" if len(context) == 0 else "continuation"
        raise EvalError(f"request {request_index}: the {what} has no tokens; there must be at least one")
    all_tokens = np.concatenate([context, *continuations])
    if not 0 <= all_tokens.min() <= all_tokens.max() < vocab_size:
        raise EvalError(
            f"request {request_index}: token ids {all_tokens.min()} to {all_tokens.max()} do not fit the model's "
            f"vocabulary of {vocab_size}; use the tokenizer that the model was trained with"
        )
    max_length = max_length or len(all_tokens)
    rows: list[_Row] = []
    for index, tokens in enumerate(continuations):
        if len(tokens) > max_length:
            raise EvalError(
                f"request {request_index}: a continuation of {len(tokens)} tokens does not fit the model's context "
                f"of {max_length}; use a shorter one, or a model with a longer context"
            )
        num_truncated = max(0, len(context) + len(tokens) - 1 - max_length)
        last = rows[-1] if rows and shares_context else None
        # A row may be longer than the model's context, since only positions count: each continuation starts after it.
        if last and last.num_truncated == num_truncated and last.num_inputs + len(tokens) - 1 <= 2 * max_length:
            last.indices.append(index)
            last.continuations.append(tokens)
        else:
            rows.append(_Row(request_index, [index], context[num_truncated:], [tokens], num_truncated))
    return rows


def _batches(
    rows: list[_Row], tokens_per_batch: int, multiple: int, max_length: int | None
) -> Iterator[tuple[list[_Row], int]]:
    """Split the rows, longest first, into the largest batches within the budget. Yield each with its padded length."""
    start = 0
    while start < len(rows):
        longest = rows[start].num_inputs
        length = math.ceil(longest / multiple) * multiple
        if max_length is not None and longest <= max_length:
            length = min(length, max_length)
        size = max(1, tokens_per_batch // length)
        yield rows[start : start + size], length
        start += size


def _score_batch(
    model: Model, rows: list[_Row], length: int, device: torch.device, shares_context: bool
) -> list[tuple[np.ndarray, bool]]:
    """Return (log-likelihoods of the tokens, is_greedy) for each continuation, row by row, padded to `length`."""
    # Padding gets its own segment: no token attends to it, and its own attention row is not empty.
    inputs = np.zeros((3, len(rows), length), dtype=np.int64)
    input_ids, positions, segments = inputs  # [B, T] each
    segments[:] = -1
    # Padding too: positions that restart would mean packed documents.
    positions[:] = np.minimum(np.arange(length), (max_length_of(model.config) or length) - 1)
    # For each of the N scored tokens: the index of its logit in [B * T], and its id.
    logit_index: list[int] = []
    targets: list[int] = []
    counts = []
    for i, row in enumerate(rows):
        num_context = end = len(row.context)
        input_ids[i, :end], segments[i, :end] = row.context, 0
        for segment, tokens in enumerate(row.continuations, start=1):
            own = slice(end, end := end + len(tokens) - 1)
            input_ids[i, own] = tokens[:-1]
            positions[i, own] = np.arange(num_context, num_context + len(tokens) - 1)
            segments[i, own] = segment
            logit_index += [i * length + num_context - 1, *range(i * length + own.start, i * length + own.stop)]
            targets += list(tokens)
            counts.append(len(tokens))
    ids, position_ids, segment_ids = torch.from_numpy(inputs).to(device)
    scored = [torch.tensor(x, dtype=torch.long, device=device) for x in (logit_index, targets)]
    if shares_context:
        log_likelihoods, are_greedy = _shared_context_pass(model, ids, position_ids, segment_ids, *scored)
    else:
        log_likelihoods, are_greedy = _plain_pass(model, ids, segment_ids >= 0, *scored)
    log_likelihoods, are_greedy = log_likelihoods.cpu(), are_greedy.cpu()
    if not log_likelihoods.isfinite().all():
        raise NotFiniteError(
            "the model's log-likelihoods are not finite: use another checkpoint if its training diverged, or "
            "float32 if its numbers are too large for its dtype"
        )
    ends = np.cumsum(counts)[:-1]
    token_scores = np.split(log_likelihoods.float().numpy(), ends)
    greedy_tokens = np.split(are_greedy.numpy(), ends)
    return [(values, bool(greedy.all())) for values, greedy in zip(token_scores, greedy_tokens, strict=True)]


def _shared_context_pass(
    model: Model, input_ids: Tensor, positions: Tensor, segments: Tensor, logit_index: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (ln p [N] float32, is the most probable [N]) of the N targets, for rows that share contexts."""
    mask = None  # no row has two continuations: plain causal attention, which has the fastest kernels
    if (segments > 1).any():
        is_visible = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
        mask = is_visible.tril()[:, None]  # [B, 1, T, T], True: attend
    output = model.base_model(input_ids, attention_mask=mask, position_ids=positions, use_cache=False)
    hidden = output.last_hidden_state.flatten(0, 1)[logit_index]
    return _head_scores(model.get_output_embeddings(), hidden, targets)


def _head_scores(head: nn.Linear, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return (ln p [N], is the most probable [N]) from the last hidden states [N, D], one vocabulary slab at a time."""
    size = _by_device(VOCABULARY_SLAB, hidden.device)
    log_normalizer = best = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
    target_logit, is_first_best = torch.empty_like(best), torch.zeros_like(targets, dtype=torch.bool)
    for first in range(0, head.out_features, size):
        logits = F.linear(hidden, head.weight[first : first + size]).float()
        log_normalizer = torch.logaddexp(log_normalizer, logits.logsumexp(-1))
        slab_best = logits.amax(-1)
        in_slab = (first <= targets) & (targets < first + size)
        own_logits, own_targets = logits[in_slab], targets[in_slab] - first
        target_logit[in_slab] = own_logits.gather(-1, own_targets[:, None])[:, 0]
        # Among equally probable tokens the first is greedy. argmax is slow, and few targets are in this slab.
        is_first_best[in_slab] = (own_logits.argmax(-1) == own_targets) & (slab_best > best)[in_slab]
        best = torch.maximum(best, slab_best)
    return target_logit - log_normalizer, is_first_best & (target_logit >= best)


def _plain_pass(
    model: Model, input_ids: Tensor, is_token: Tensor, logit_index: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (ln p [N] float32, is the most probable [N]) from any causal language model's own forward."""
    length = input_ids.shape[1]
    # Columns counted from the end are the same in all logits and in only the last few.
    columns = logit_index % length - length
    logits = model(
        input_ids, attention_mask=is_token.long(), use_cache=False, logits_to_keep=-columns.min().item()
    ).logits
    logits = logits[logit_index // length, columns].float()
    target_logit = logits.gather(-1, targets[:, None])[:, 0]
    return target_logit - logits.logsumexp(-1), logits.argmax(-1) == targets
