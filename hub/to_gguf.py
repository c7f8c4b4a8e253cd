"""
A checkpoint as GGUF files for llama.cpp and what is built on it, through the package gguf: F16 and Q8_0.

Names of tensors and of metadata are the package's own for GPT-2. What is F32, F16 or Q8_0 follows llama.cpp's
converter: matrices in the file's type, the position embedding and everything of one dimension in F32. A tied head is
not written: llama.cpp takes the token embedding for it.
"""

import numpy as np

from hub import HubError
from hub.export import bpe_of


def write_gguf(model, tokenizer, folder, *, name, license_id):
    """
    See `hub.export`.

    Args:
        name: of the model; the files' names begin with it.
        license_id: as the Hub knows it; None: not said.
    """
    from gguf import GGMLQuantizationType, LlamaFileType

    for suffix, kind, file_type in (
        ("F16", GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
        ("Q8_0", GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    ):
        path = folder / f"{name}-{suffix}.gguf"
        _write(path, model, tokenizer, name, license_id, kind, file_type)
        _check(path, model, kind)


def _write(path, model, tokenizer, name, license_id, kind, file_type):
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2])
    writer.add_type("model")
    writer.add_name(name)
    writer.add_size_label(f"{model.num_parameters() / 1e6:.0f}M")
    if license_id is not None:
        writer.add_license(license_id)
    writer.add_tags(["text-generation", "gpt2"])
    writer.add_languages(["en"])
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)

    tokens, types, merges = _vocabulary(tokenizer, config.vocab_size)
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

    for tensor_name, array in _tensors(model):
        tensor_kind = _kind_of(tensor_name, array, kind)
        data = array if tensor_kind == gguf.GGMLQuantizationType.F32 else gguf.quants.quantize(array, tensor_kind)
        writer.add_tensor(tensor_name, data, raw_dtype=tensor_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model):
    """(GGUF's name, float32 array) of every parameter; [out, in] of a linear layer, which is GGUF's way too."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, model.config.n_layer)
    for name, parameter in model.named_parameters():  # a tied head is none of its own
        mapped = names.get_name(name.removeprefix("transformer."), try_suffixes=(".weight", ".bias"))
        yield mapped or names.get_name(name, try_suffixes=(".weight", ".bias")), parameter.detach().numpy()


def _kind_of(name, array, kind):
    import gguf

    if array.ndim == 1 or name.startswith("position_embd"):
        return gguf.GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if array.shape[1] % block == 0 else gguf.GGMLQuantizationType.F16


def _vocabulary(tokenizer, vocab_size):
    """(tokens, their types, merges). Ids beyond the tokenizer's, of a resized model, are tokens that never occur."""
    import gguf

    vocabulary, merges = bpe_of(tokenizer)
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
    for i, added in tokenizer.added_tokens_decoder.items():
        types[i] = gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED
    return tokens, types, [f"{a} {b}" for a, b in merges]


def _check(path, model, kind):
    """Reads the file back. Raises HubError for a tensor that is missing, or is not what its type's rounding allows."""
    import gguf

    there = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    expected = dict(_tensors(model))
    if there.keys() != expected.keys():
        raise HubError(f"{path.name} has other tensors than the model: {sorted(there.keys() ^ expected.keys())}")
    for name, array in expected.items():
        tensor = there[name]
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(array.shape)
        allowed = {
            gguf.GGMLQuantizationType.F32: np.zeros(()),
            gguf.GGMLQuantizationType.F16: np.abs(array) * 2.0**-11 + 2.0**-24,  # half a unit in the last place
        }
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0:  # a scale in F16 and 8 bits for each 32 numbers
            largest = np.abs(array).reshape(-1, 32).max(axis=1, keepdims=True)
            limit = np.repeat(largest * (0.5 / 127 + 2.0**-10), 32, axis=1).reshape(array.shape) + 2.0**-18
        else:
            limit = allowed[tensor.tensor_type]
        if not np.all(np.abs(found - array) <= limit):
            raise HubError(f"{path.name}: {name} is not what was written; try again, on another disk")
