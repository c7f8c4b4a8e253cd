"""Conversion from and to transformers' GPT-2.

Parameter names are equal, and the weights of linear layers are transposed (transformers uses `Conv1D`).
"""

import copy
import inspect
from typing import Any, TypeVar

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedConfig, PreTrainedModel

from .configuration_gpt2repro import GPT2ReproConfig

# All other fields of GPT2ReproConfig have the same name and meaning in GPT2Config.
_OWN_FIELDS = ("is_causal", "logits_in_training", "residual_in_autocast_dtype", "kwargs")
_SHARED_FIELDS = [name for name in inspect.signature(GPT2ReproConfig).parameters if name not in _OWN_FIELDS]
# Options of transformers' GPT2Config that this model does not have, with the value of the published GPT-2.
_REQUIRED_OPTIONS = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}
_CONV1D_WEIGHTS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


Model = TypeVar("Model", bound=PreTrainedModel)


def convert_from_gpt2(model_class: type[Model], model_or_path: GPT2LMHeadModel | str, **kwargs: Any) -> Model:
    """Copy a transformers GPT-2 into `model_class` (see `GPT2ReproForCausalLM.from_gpt2`)."""
    if not isinstance(model_or_path, torch.nn.Module):
        gpt2 = GPT2LMHeadModel.from_pretrained(model_or_path, **kwargs)
    elif kwargs:
        raise ValueError(f"{sorted(kwargs)} apply to a folder or a Hub id, not to a model already in memory")
    else:
        gpt2 = model_or_path
    if not isinstance(gpt2, GPT2LMHeadModel):
        raise ValueError(f"from_gpt2 needs a GPT2LMHeadModel, a folder or a Hub id, got a {type(gpt2).__name__}")
    for field, expected in _REQUIRED_OPTIONS.items():
        value = getattr(gpt2.config, field)
        if value != expected:
            raise ValueError(f"{field}={value} cannot be converted: the published GPT-2 has {field}={expected}")
    config = GPT2ReproConfig(**{field: getattr(gpt2.config, field) for field in _SHARED_FIELDS})
    return _copy(gpt2, model_class, config)


def convert_to_gpt2(model: PreTrainedModel) -> GPT2LMHeadModel:
    """Copy the model into a transformers GPT-2 (see `GPT2ReproForCausalLM.to_gpt2`)."""
    if not model.config.is_causal:
        raise ValueError(
            "a model with is_causal=False cannot be converted: GPT2LMHeadModel attends to earlier tokens only"
        )
    fields = {field: getattr(model.config, field) for field in _SHARED_FIELDS}
    fields["n_ctx"] = model.config.n_positions  # older name of n_positions, which llama.cpp's converter still reads
    return _copy(model, GPT2LMHeadModel, GPT2Config(architectures=["GPT2LMHeadModel"], **fields))


def _copy(source: PreTrainedModel, model_class: type[Model], config: PreTrainedConfig) -> Model:
    """Create a model of `model_class` with the weights of `source`."""
    with torch.device("meta"):
        model = model_class._from_config(config, attn_implementation=source.config._attn_implementation)
    state = {}  # one copy per tensor, so that peak memory is two models
    for name, tensor in source.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
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
    model.generation_config = copy.deepcopy(source.generation_config)
    return model.train(source.training)
