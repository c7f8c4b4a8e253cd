"""Shared by the export formats: the tokenizer's files, its vocabulary, and the comparison of logits."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from hub import HubError
from modeling_gpt2repro import GPT2ReproForCausalLM

_CHECKED_TOKENS = 16


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save transformers' tokenizer files, and vocab.json and merges.txt for engines older than tokenizer.json."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers package raises a plain Exception if the disk is full
        raise OSError(str(error)) from error
    vocabulary, merges = byte_level_bpe(tokenizer)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    (folder / "merges.txt").write_text(lines, encoding="utf-8", newline="\n")  # other engines split at \n alone


def byte_level_bpe(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return ({token: id}, merges in order of priority). Raises HubError if it is not GPT-2's byte-level BPE."""
    with contextlib.suppress(AttributeError, KeyError, ValueError):
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        if state["model"]["type"] == "BPE" and state["pre_tokenizer"]["type"] == "ByteLevel":
            vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
            return vocabulary, [(first, second) for first, second in state["model"]["merges"]]
    raise HubError(f"the checkpoint's tokenizer, a {type(tokenizer).__name__}, is not GPT-2's byte-level BPE")


@torch.no_grad()
def compare_logits(
    model: GPT2ReproForCausalLM, exported_logits: Callable[[torch.Tensor], torch.Tensor], *, tolerance: float
) -> None:
    """Compare logits with those of an exported model, which maps token ids [B, T] to logits [B, T, V].

    Raises HubError if they differ by more than the tolerance, or are not finite.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(_CHECKED_TOKENS, model.config.n_positions)
    ids = torch.randint(0, model.config.vocab_size, (2, length), generator=generator)
    difference = (exported_logits(ids) - model(ids).logits).abs().max().item()
    if not difference <= tolerance:  # also if it is not a number
        raise HubError(f"the exported model's logits differ by {difference:.2g} (allowed: {tolerance:.2g})")
