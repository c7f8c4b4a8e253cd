"""Weights from and to transformers' own GPT-2. The names are the same; linear weights are transposed."""

import copy

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from .configuration_gpt2repro import GPT2ReproConfig

# Fields that both configs have and that mean the same in both.
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
# Options of transformers' GPT2Config that GPT-2 as published does not use, and the one value that is GPT-2.
_NOT_GPT2 = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}
_CONV1D_WEIGHTS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def from_gpt2(model_class, model_or_path, **kwargs):
    """See `GPT2ReproForCausalLM.from_gpt2`."""
    gpt2 = model_or_path
    if not isinstance(gpt2, torch.nn.Module):
        gpt2 = GPT2LMHeadModel.from_pretrained(model_or_path, **kwargs)
    elif not isinstance(gpt2, GPT2LMHeadModel):
        raise ValueError(f"from_gpt2 takes a GPT2LMHeadModel, a folder or a Hub id, got a {type(gpt2).__name__}")
    elif kwargs:
        raise ValueError(f"{sorted(kwargs)} apply to a folder or a Hub id, not to a model already in memory")
    for field, expected in _NOT_GPT2.items():
        value = getattr(gpt2.config, field, expected)
        if value != expected:
            raise ValueError(f"{field}={value} is not GPT-2 as published ({field}={expected}); cannot convert")
    config = GPT2ReproConfig(**{field: getattr(gpt2.config, field) for field in _SHARED_FIELDS})
    with torch.device("meta"):
        model = model_class._from_config(config, attn_implementation=gpt2.config._attn_implementation)
    model.generation_config = copy.deepcopy(gpt2.generation_config)
    return _adopt(model, gpt2)


def to_gpt2(model):
    """See `GPT2ReproForCausalLM.to_gpt2`."""
    config = GPT2Config(
        **{field: getattr(model.config, field) for field in _SHARED_FIELDS},
        architectures=["GPT2LMHeadModel"],
        n_ctx=model.config.n_positions,  # its older name, which llama.cpp's converter and others still ask for
    )
    if not model.config.is_causal:
        raise ValueError("is_causal=False is not GPT-2: a plain GPT2LMHeadModel attends to earlier tokens only")
    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel._from_config(config, attn_implementation=model.config._attn_implementation)
    if any(buffer.is_meta for buffer in gpt2.buffers()):
        # transformers 5.0 keeps causal masks as buffers, the same in every block; a model of one small block has them.
        small = GPT2LMHeadModel(GPT2Config(n_positions=config.n_positions, vocab_size=1, n_embd=1, n_layer=1, n_head=1))
        masks = small.transformer.h[0].attn._buffers
        for block in gpt2.transformer.h:
            block.attn._buffers.update({name: mask.clone() for name, mask in masks.items()})
    gpt2.generation_config = copy.deepcopy(model.generation_config)
    return _adopt(gpt2, model)


def _adopt(model, source):
    """Gives `model`, still on the meta device, copies of `source`'s weights; one tensor at a time."""
    state = {}
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
