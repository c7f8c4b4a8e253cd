"""Write GGUF files, F16 and Q8_0, for llama.cpp and the programs built on it, with the package gguf.

Names of tensors and metadata are the package's own for GPT-2. Types follow llama.cpp's converter: matrices in the
file's type, the position embedding and one-dimensional tensors in F32. A tied head is not written: llama.cpp uses the
token embedding.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedTokenizerBase

from hub import HubError
from modeling_gpt2repro import GPT2ReproForCausalLM

if TYPE_CHECKING:
    from gguf import TokenType


def write_gguf(
    model: GPT2ReproForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, *, name: str, license: str | None
) -> None:
    """Write NAME-F16.gguf and NAME-Q8_0.gguf and read them back.

    Args:
        license: license of the weights, by the Hub's name for it; None if it is not known.

    Raises:
        HubError: a file read back differs from the model by more than its rounding.
    """
    import gguf
    from gguf import GGMLQuantizationType, LlamaFileType

    config = model.config
    tokens, types, merges = _vocabulary(tokenizer, config.vocab_size)
    tensors = dict(_tensors(model))
    for file_type, kind in (
        (LlamaFileType.MOSTLY_F16, GGMLQuantizationType.F16),
        (LlamaFileType.MOSTLY_Q8_0, GGMLQuantizationType.Q8_0),
    ):
        path = folder / f"{name}-{kind.name}.gguf"
        writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2])
        writer.add_type("model")
        writer.add_name(name)
        writer.add_size_label(f"{model.num_parameters() / 1e6:.0f}M")
        if license is not None:
            writer.add_license(license)
        writer.add_tags(["text-generation", "gpt2"])
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.n_positions)
        writer.add_embedding_length(config.n_embd)
        writer.add_feed_forward_length(config.n_inner)
        writer.add_block_count(config.n_layer)
        writer.add_head_count(config.n_head)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)

        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
        for add, token in (
            (writer.add_bos_token_id, tokenizer.bos_token_id),
            (writer.add_eos_token_id, tokenizer.eos_token_id),
            (writer.add_unk_token_id, tokenizer.unk_token_id),
        ):
            if token is not None:
                add(token)
        writer.add_add_bos_token(False)

        block, _ = gguf.GGML_QUANT_SIZES[kind]
        for tensor_name, array in tensors.items():
            is_float32 = array.ndim == 1 or tensor_name.startswith("position_embd")
            of_matrix = kind if array.shape[-1] % block == 0 else GGMLQuantizationType.F16
            tensor_kind = GGMLQuantizationType.F32 if is_float32 else of_matrix
            writer.add_tensor(tensor_name, gguf.quants.quantize(array, tensor_kind), raw_dtype=tensor_kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _check(path, tensors)


def _tensors(model: GPT2ReproForCausalLM) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (GGUF's name, float32 array) of every parameter. Linear layers are [out, in], as GGUF has them."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, model.config.n_layer)
    for name, parameter in model.named_parameters():  # lists a tied head once, as the embedding
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        yield gguf_name, parameter.detach().numpy()


def _vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> tuple[list[str], list["TokenType"], list[str]]:
    """Return (tokens, their types, merges). Ids that the tokenizer lacks (resized models) become unused tokens."""
    import gguf

    vocabulary, merges = byte_level_bpe(tokenizer)
    split = tokenizer.backend_tokenizer.pre_tokenizer
    if split.add_prefix_space or not split.use_regex or tokenizer.backend_tokenizer.normalizer is not None:
        raise HubError(
            "llama.cpp splits a text as GPT-2's tokenizer does, and this checkpoint's tokenizer does not (it has a "
            "normalizer, adds a space or does not split at words): export --to gpt2 instead"
        )
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
    for i, added in tokenizer.added_tokens_decoder.items():
        types[i] = gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED
    return tokens, types, [f"{a} {b}" for a, b in merges]


def byte_level_bpe(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return ({token: id}, merges in order of priority). Raises HubError if it is not GPT-2's byte-level BPE."""
    with contextlib.suppress(AttributeError, KeyError, ValueError):
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        if state["model"]["type"] == "BPE" and state["pre_tokenizer"]["type"] == "ByteLevel":
            vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
            return vocabulary, [(first, second) for first, second in state["model"]["merges"]]
    raise HubError(f"the checkpoint's tokenizer, a {type(tokenizer).__name__}, is not GPT-2's byte-level BPE")


def _check(path: Path, expected: dict[str, np.ndarray]) -> None:
    """Read the file back. Raises HubError if a tensor is missing or differs by more than the rounding of its type."""
    import gguf

    written = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    if written.keys() != expected.keys():
        raise HubError(f"{path.name} has other tensors than the model: {sorted(written.keys() ^ expected.keys())}")
    for name, array in expected.items():
        kind = written[name].tensor_type
        values = gguf.quants.dequantize(written[name].data, kind).reshape(array.shape)
        if kind == gguf.GGMLQuantizationType.Q8_0:  # 8 bits per value, and a scale in F16 per 32 values
            largest = np.abs(array).reshape(-1, 32).max(axis=1, keepdims=True)
            limit = np.repeat(largest * (0.5 / 127 + 2.0**-10), 32, axis=1).reshape(array.shape) + 2.0**-18
        elif kind == gguf.GGMLQuantizationType.F16:
            limit = np.abs(array) * 2.0**-11 + 2.0**-24  # half a unit in the last place
        else:
            limit = np.zeros(())
        if not np.all(np.abs(values - array) <= limit):
            raise HubError(f"{path.name}: {name} reads back with other values; try again, on another disk")
