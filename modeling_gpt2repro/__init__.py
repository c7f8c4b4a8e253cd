"""GPT-2 as a Hugging Face model.

Importing this package registers `model_type: gpt2repro` with the Auto classes.

    configuration_gpt2repro.py   GPT2ReproConfig, with checks of its fields
    modeling_gpt2repro.py        attention, MLP, block, GPT2ReproModel, GPT2ReproForCausalLM, classifiers
    loss.py                      cross-entropy of the head without the full logits
    mlp.py                       MLP that saves fewer activations for the backward pass
    conversion.py                conversion from and to transformers' GPT-2

Every checkpoint carries a copy of these files (`trust_remote_code=True`), so they import only torch, transformers
and each other.
"""

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_gpt2repro import GPT2ReproConfig
from .modeling_gpt2repro import (
    GPT2ReproForCausalLM,
    GPT2ReproForSequenceClassification,
    GPT2ReproForTokenClassification,
    GPT2ReproModel,
    GPT2ReproPreTrainedModel,
)

AutoConfig.register("gpt2repro", GPT2ReproConfig)
AutoModelForCausalLM.register(GPT2ReproConfig, GPT2ReproForCausalLM)
AutoModelForSequenceClassification.register(GPT2ReproConfig, GPT2ReproForSequenceClassification)
AutoModelForTokenClassification.register(GPT2ReproConfig, GPT2ReproForTokenClassification)

__all__ = [
    "GPT2ReproConfig",
    "GPT2ReproForCausalLM",
    "GPT2ReproForSequenceClassification",
    "GPT2ReproForTokenClassification",
    "GPT2ReproModel",
    "GPT2ReproPreTrainedModel",
]
