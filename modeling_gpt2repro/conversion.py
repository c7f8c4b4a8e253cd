"""Conversion from and to transformers' GPT-2.

Parameter names are equal, and the weights of linear layers are transposed (transformers uses `Conv1D`).
"""

import copy
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from .configuration_gpt2repro import GPT2ReproConfig

# Fields that have the same name and meaning in both configs.
_SHARED_FIELDS = (
    "vocab_size",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "n_inner",
    "activation_function",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "layer_norm_epsilon",
    "initializer_range",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
)
# Options of transformers' GPT2Config that this model does not have, with the value of the published GPT-2.
_REQUIRED_OPTIONS = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}
_CONV1D_WEIGHTS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def from_gpt2(
    model_class: type[PreTrainedModel], model_or_path: GPT2LMHeadModel | str, **kwargs: Any
) -> PreTrainedModel:
    """Copy a transformers GPT-2 into `model_class` (see `GPT2ReproForCausalLM.from_gpt2`)."""
    gpt2 = model_or_path
    if not isinstance(gpt2, torch.nn.Module):
        gpt2 = GPT2LMHeadModel.from_pretrained(model_or_path, **kwargs)
    elif not isinstance(gpt2, GPT2LMHeadModel):
        raise ValueError(f"from_gpt2 needs a GPT2LMHeadModel, a folder or a Hub id, got a {type(gpt2).__name__}")
    elif kwargs:
        raise ValueError(f"{sorted(kwargs)} apply to a folder or a Hub id, not to a model already in memory")
    for field, expected in _REQUIRED_OPTIONS.items():
        value = getattr(gpt2.config, field, expected)
        if value != expected:
            raise ValueError(f"{field}={value} cannot be converted: the published GPT-2 has {field}={expected}")
    config = GPT2ReproConfig(**{field: getattr(gpt2.config, field) for field in _SHARED_FIELDS})
    with torch.device("meta"):
        model = model_class._from_config(config, attn_implementation=gpt2.config._attn_implementation)
    model.generation_config = copy.deepcopy(gpt2.generation_config)
    return _copy_weights(model, gpt2)


def to_gpt2(model: PreTrainedModel) -> GPT2LMHeadModel:
    """Copy the model into a transformers GPT-2 (see `GPT2ReproForCausalLM.to_gpt2`)."""
    config = GPT2Config(
        **{field: getattr(model.config, field) for field in _SHARED_FIELDS},
        architectures=["GPT2LMHeadModel"],
        n_ctx=model.config.n_positions,  # older name of n_positions, which llama.cpp's converter still reads
    )
    if not model.config.is_causal:
        raise ValueError(
            "a model with is_causal=False cannot be converted: GPT2LMHeadModel attends to earlier tokens only"
        )
    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel._from_config(config, attn_implementation=model.config._attn_implementation)
    if any(buffer.is_meta for buffer in gpt2.buffers()):
        # transformers 5.0 keeps the same causal masks as buffers in every block. Copy them from a tiny model.
        small = GPT2LMHeadModel(GPT2Config(n_positions=config.n_positions, vocab_size=1, n_embd=1, n_layer=1, n_head=1))
        masks = small.transformer.h[0].attn._buffers
        for block in gpt2.transformer.h:
            block.attn._buffers.update({name: mask.clone() for name, mask in masks.items()})
    gpt2.generation_config = copy.deepcopy(model.generation_config)
    return _copy_weights(gpt2, model)


def _copy_weights(model: PreTrainedModel, source: PreTrainedModel) -> PreTrainedModel:
    """Copy the weights of `source` into `model`, which is on the meta device, and return `model`."""
    state = {}  # one copy per tensor, so that peak memory is two models
    for name, tensor in source.state_dict().items():
        if name == "lm_head.weight" and source.config.tie_word_embeddings:
            continue
        tensor = tensor.detach()
        transposed = tensor.T if name.endswith(_CONV1D_WEIGHTS) else tensor
        state[name] = transposed.clone(memory_format=torch.contiguous_format)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name in missing if name != "lm_head.weight"]
    if missing or unexpected:
        raise ValueError(f"weights do not match: missing {missing}, unexpected {unexpected}")
    model.config.dtype = source.dtype
    return model.train(source.training)
