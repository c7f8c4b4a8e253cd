"""Sampling for sample.py and the demo: settings, prompts, and transformers' own `generate`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedConfig, PreTrainedTokenizerBase

from hub import HubError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling settings of `stream_tokens`. Raises HubError for a value out of range."""

    temperature: float = 1.0  # divides the logits; 0 always takes the most probable token
    top_k: int = 50  # sample from the k most probable tokens; 0: from all
    top_p: float = 1.0  # sample from the most probable tokens whose probabilities add up to p (Holtzman et al. 2020)
    max_new_tokens: int = 100
    seed: int = 1337  # the same seed, weights and settings give the same text

    def __post_init__(self) -> None:
        for name, is_valid, valid_range in (
            ("temperature", self.temperature == 0 or self.temperature >= 1e-6, "0 or at least 1e-6"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("seed", 0 <= self.seed < 2**63, "between 0 and 2**63 - 1"),
        ):
            if not is_valid:
                raise HubError(f"{name} must be {valid_range}, got {getattr(self, name)}")


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, config: PreTrainedConfig) -> list[int]:
    """Return the token ids of a prompt: at least one, and fewer than the model's context holds.

    An empty prompt becomes the token that begins texts.

    Raises:
        HubError: the prompt is not text or too long, the tokenizer does not fit the model, or the model's config does
            not give the length of its context.
    """
    _check_utf8(prompt)
    ids = tokenizer(prompt, verbose=False).input_ids
    if not ids and tokenizer.bos_token_id is None:
        raise HubError("the prompt is empty, and the tokenizer has no token that begins texts: give a word")
    ids = ids or [tokenizer.bos_token_id]
    _check_ids(ids, config)
    return ids


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], config: PreTrainedConfig, params: SamplingParams
) -> tuple[list[dict[str, str]], list[int]]:
    """Return the latest messages, and their token ids by the tokenizer's chat template, up to where the answer begins.

    The oldest questions are dropped with their answers until max_new_tokens tokens of the context, at most half of it,
    are free for the answer. For the errors, see `encode_prompt`.

    Args:
        messages: {"role": "user" or "assistant", "content": text} in turns; the last one is the user's.
    """
    context = context_of(config)
    _check_utf8(messages[-1]["content"])
    while True:
        ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        if len(ids) <= max(context - params.max_new_tokens, context // 2) or len(messages) == 1:
            break
        messages = messages[2:]
    _check_ids(ids, config)
    return messages, ids


def context_of(config: PreTrainedConfig) -> int:
    """Return the length of a model's context, in tokens. Raises HubError if its config does not have it."""
    context: int | None = getattr(config, "max_position_embeddings", None)
    if context is None:
        raise HubError(
            f"the config of this {config.model_type!r} model has no max_position_embeddings: use a model whose config "
            "gives the length of its context"
        )
    return context


def _check_utf8(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError:  # Python decodes bytes that are not UTF-8 to lone surrogates
        raise HubError(f"the prompt {prompt[:40]!a} is not UTF-8 text: convert it first") from None


def _check_ids(ids: list[int], config: PreTrainedConfig) -> None:
    context = context_of(config)
    if max(ids) >= config.vocab_size:
        raise HubError(
            f"the tokenizer gives token {max(ids):,} and the model has {config.vocab_size:,}: put the model's own "
            "tokenizer into its folder"
        )
    if len(ids) >= context:
        raise HubError(
            f"the prompt has {len(ids):,} tokens and the model's context {context:,}: shorten it to {context - 1:,} "
            "at most"
        )


def stream_tokens(model: Any, prompt_ids: list[int], params: SamplingParams) -> Iterator[tuple[int, torch.Tensor]]:
    """Continue a prompt up to max_new_tokens, the end-of-text token (not included) or the end of the context.

    Yield the tokens of `model.generate` one by one, each with the probabilities of all tokens at its position, [V],
    before temperature, top_k and top_p. Every token is a call of `generate` with the cache of the call before, so a
    caller can stop at any token and no thread is needed. The calls share PyTorch's global random state: run one stream
    at a time. Raises HubError if the model's logits are not finite.
    """
    torch.manual_seed(params.seed)
    ids, cache = torch.tensor([prompt_ids], device=model.device), None
    end = model.generation_config.eos_token_id
    options: dict[str, Any] = {"do_sample": params.temperature > 0}
    if params.temperature > 0:
        options |= {"temperature": float(params.temperature), "top_k": params.top_k, "top_p": float(params.top_p)}
    for _ in range(min(params.max_new_tokens, context_of(model.config) - len(prompt_ids))):
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=1,
            num_beams=1,
            logits_processor=LogitsProcessorList([_check_finite]),
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
        ids, cache = output.sequences, output.past_key_values
        token = int(ids[0, -1])
        if token in (end if isinstance(end, list) else [end]):
            return
        yield token, output.logits[0][0].softmax(-1)


def _check_finite(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return the logits [B, V] unchanged. As a logits processor of `generate`, stop if they give no probabilities."""
    if not logits.softmax(-1).isfinite().all():
        raise HubError("the model's logits are not finite: its training diverged; use an earlier checkpoint")
    return logits
