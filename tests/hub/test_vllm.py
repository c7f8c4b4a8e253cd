"""
The steps of vLLM's transformers backend (vllm/model_executor/models/transformers/base.py) without vLLM, which is too
large for a test. RECORDS.md has the run of vLLM itself.
"""

import ast
import inspect
import json
import textwrap

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModel

from modeling_gpt2repro.modeling_gpt2repro import GPT2ReproAttention, eager_attention


class ReplacedLinear(torch.nn.Module):
    """vLLM replaces nn.Linear by its own layers."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias)


def paged_attention(module, query, key, value, attention_mask, attention_instances=None, scaling=None, **kwargs):
    """Like vLLM's: without a mask, it looks up its own object by layer, which knows where texts begin."""
    assert attention_mask is None and module.is_causal
    starts = attention_instances[module.layer_idx]
    same_text = starts[:, None] == starts[None]
    sees = same_text & torch.ones_like(same_text).tril()
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(query.dtype).min)
    return eager_attention(module, query, key, value, mask, scaling)


def test_source_has_the_attention_lookup_that_vllm_searches_for():
    """vLLM 0.32 needs `name = ALL_ATTENTION_FUNCTIONS[...]`, an assignment of its own, and one call of that name."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(GPT2ReproAttention.forward)))
    lookups = [
        node.targets[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Subscript)
        and ast.unparse(node.value.value) == "ALL_ATTENTION_FUNCTIONS"
    ]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in lookups]
    assert len(lookups) == len(calls) == 1
    [scaling] = [keyword.value for keyword in calls[0].keywords if keyword.arg == "scaling"]
    assert ast.unparse(scaling) == "self.scaling"


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(9, 3, 20), (100, 90, 60)], ids=["short", "together longer than the context"])
def test_vllm_steps_give_the_logits_of_the_model(checkpoint, model, lengths):
    config = AutoConfig.from_pretrained(checkpoint)
    assert json.loads((checkpoint / "config.json").read_text())["auto_map"]["AutoModel"].endswith(".GPT2ReproModel")
    assert type(model)._supports_attention_backend
    names = ("hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings")
    assert [getattr(config.get_text_config(), name) for name in names] == [64, 4, 2, 128]
    assert config.tie_word_embeddings

    AttentionInterface.register("paged_attention_of_vllm", paged_attention)
    config._attn_implementation = "paged_attention_of_vllm"
    with torch.device("meta"):
        trunk = AutoModel.from_config(config)
    assert type(trunk.get_decoder()) is type(trunk)
    prefix = f"{model.base_model_prefix}."
    weights = {name.removeprefix(prefix): w for name, w in model.state_dict().items() if name.startswith(prefix)}
    trunk.load_state_dict(weights, assign=True)
    for module in list(trunk.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, ReplacedLinear(child))
    embedding = torch.nn.Embedding.from_pretrained(trunk.get_input_embeddings().weight)
    trunk.set_input_embeddings(embedding)
    trunk.eval()

    texts = [torch.randint(0, 50257, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    starts = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    outputs = trunk(
        input_ids=torch.cat(texts)[None],
        inputs_embeds=None,
        use_cache=False,
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        attention_instances={layer: starts for layer in range(config.num_hidden_layers)},
        return_dict=False,
    )
    logits = outputs[0][0] @ embedding.weight.T
    for text, found in zip(texts, logits.split(lengths), strict=True):
        torch.testing.assert_close(found, model(text[None]).logits[0], atol=1e-4, rtol=1e-4)
