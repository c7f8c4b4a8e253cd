"""
GPT-2 as a Hugging Face model. Importing this package makes the Auto classes know `model_type: gpt2repro`.

    configuration_gpt2repro.py   GPT2ReproConfig: the shape, checked
    modeling_gpt2repro.py        attention, MLP, block, GPT2ReproModel, GPT2ReproForCausalLM, classifiers
    loss.py                      the head's cross-entropy, without the logits
    mlp.py                       the MLP, with less kept for the backward pass
    conversion.py                weights from and to transformers' GPT-2

These files travel with every checkpoint (`trust_remote_code=True`), so they import torch, transformers and
each other, and nothing else.
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
