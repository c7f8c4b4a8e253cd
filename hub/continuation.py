"""Text as a model writes it: token by token, with what else it might have written."""

from typing import NamedTuple

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hub import HubError


class Settings(NamedTuple):
    """How the next token is chosen."""

    temperature: float = 1.0
    """what logits are divided by; 0 takes the most probable token"""
    top_k: int = 50
    """choose among so many most probable tokens; 0: all"""
    top_p: float = 1.0
    """choose among the most probable tokens that have so much probability together (nucleus, Holtzman et al. 2020)"""
    max_new_tokens: int = 100
    """tokens to write, at most"""
    seed: int = 1337
    """the same seed, weights and settings write the same text"""

    def check(self):
        """Raises HubError for a value that cannot be."""
        for name, value, fits, range_ in (
            ("temperature", self.temperature, self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("seed", self.seed, 0 <= self.seed < 2**63, "a whole number from 0 up"),
        ):
            if not fits:
                raise HubError(f"{name} must be {range_}, got {value}")


class Step(NamedTuple):
    """One more token."""

    token: int
    probabilities: torch.Tensor
    """[V], of every token at this place, before temperature, top_k and top_p"""


def encode_prompt(tokenizer, prompt, config):
    """
    Args:
        config: the model's.

    Returns:
        list of token ids; the one that begins texts for an empty prompt.

    Raises:
        HubError: the prompt is no text, or leaves no room for one more token; the tokenizer is not the model's; nobody
            says how long the context is.
    """
    n_positions = getattr(config, "max_position_embeddings", None)
    if n_positions is None:
        raise HubError(
            f"a {config.model_type!r} model does not say how long its context is: only those that do can write"
        )
    try:
        prompt.encode()
    except UnicodeEncodeError:  # what Python makes of bytes that are no UTF-8
        raise HubError(f"the prompt {prompt[:40]!a} is not UTF-8 text: convert it first") from None
    ids = tokenizer(prompt, verbose=False).input_ids
    if not ids and tokenizer.bos_token_id is None:
        raise HubError("the prompt is empty, and the tokenizer has no token that begins texts: give a word")
    ids = ids or [tokenizer.bos_token_id]
    if max(ids) >= config.vocab_size:
        raise HubError(
            f"the tokenizer gives token {max(ids):,} and the model has {config.vocab_size:,}: put the model's own there"
        )
    if len(ids) >= n_positions:
        raise HubError(
            f"the prompt has {len(ids):,} tokens and the model's context {n_positions:,}: shorten it to "
            f"{n_positions - 1:,} at most"
        )
    return ids


def continuation(model, prompt_ids, settings):
    """
    What `model.generate` writes with the same settings, one token at a time.

    Args:
        model: a causal language model with n_positions or max_position_embeddings in its config, in eval mode.
        prompt_ids: list of token ids, at least one and fewer than the context holds.
        settings: Settings.

    Yields:
        Step. It ends after max_new_tokens, at the end-of-text token (which is not given) or where the context is full.

    Raises:
        HubError: the model's logits are not finite.
    """
    generator = torch.Generator(model.device).manual_seed(settings.seed)
    warpers = LogitsProcessorList()
    if settings.temperature not in (0, 1):
        warpers.append(TemperatureLogitsWarper(float(settings.temperature)))
    if settings.top_k:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        warpers.append(TopPLogitsWarper(settings.top_p))
    ends = model.config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    room = model.config.max_position_embeddings - len(prompt_ids)
    new_ids = torch.tensor([prompt_ids], device=model.device)
    cache = None
    for _ in range(min(settings.max_new_tokens, room)):
        # Not around the loop: what a caller does between two tokens is its own business.
        with torch.no_grad():
            outputs = model(new_ids, past_key_values=cache, use_cache=True)
            cache, logits = outputs.past_key_values, outputs.logits[:, -1].float()
            probabilities = logits.softmax(-1)[0]
            if not probabilities.isfinite().all():
                raise HubError(
                    "the model's logits are not finite: its training has diverged; take an earlier checkpoint"
                )
            if settings.temperature == 0:
                token = logits.argmax(-1, keepdim=True)
            else:
                token = torch.multinomial(warpers(new_ids, logits).softmax(-1), 1, generator=generator)
        if token.item() in ends:
            return
        yield Step(token.item(), probabilities)
        new_ids = token


def text_pieces(tokenizer, tokens):
    """
    Args:
        tokens: iterable of token ids, read as the pieces are asked for.

    Yields:
        str, one a token: together the text. A character whose bytes are spread over tokens comes with the last of them,
        and the ones before give "".
    """
    waiting = []
    for token in tokens:
        waiting.append(token)
        text = tokenizer.decode(waiting)
        # At most 4 bytes are a character of UTF-8; what is no character by then never becomes one.
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(waiting) < 4:
            yield ""
        else:
            waiting = []
            yield text
    if waiting:
        yield tokenizer.decode(waiting)


def top_tokens(tokenizer, probabilities, count=10):
    """
    Args:
        probabilities: [V].

    Returns:
        list of (text, token id, probability), the most probable first. A token that is part of a character has its
        name in the vocabulary for a text.
    """
    best = probabilities.topk(min(count, len(probabilities)))
    shown = []
    for token, p in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        text = tokenizer.decode([token])
        name = tokenizer.convert_ids_to_tokens(token)
        shown.append((name if "\N{REPLACEMENT CHARACTER}" in text else text, token, p))
    return shown
