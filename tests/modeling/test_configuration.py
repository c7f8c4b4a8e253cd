import json

import pytest
from transformers import AutoConfig

from modeling_gpt2repro import GPT2ReproConfig


def test_defaults_are_gpt2_124m():
    config = GPT2ReproConfig()
    assert (config.vocab_size, config.n_positions, config.n_embd) == (50257, 1024, 768)
    assert (config.n_layer, config.n_head, config.n_inner) == (12, 12, 3072)
    assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == 0
    assert config.bos_token_id == config.eos_token_id == 50256
    assert config.tie_word_embeddings


def test_standard_names_are_aliases():
    config = GPT2ReproConfig(n_embd=96, n_layer=3, n_head=6, n_positions=64)
    assert (config.hidden_size, config.num_hidden_layers) == (96, 3)
    assert (config.num_attention_heads, config.max_position_embeddings) == (6, 64)
    assert GPT2ReproConfig(hidden_size=96, num_attention_heads=6).n_embd == 96


def test_round_trip_through_auto_config(tmp_path):
    config = GPT2ReproConfig(n_embd=96, n_layer=3, n_head=6, n_positions=64, resid_pdrop=0.1)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gpt2repro"
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is GPT2ReproConfig
    for name in ("n_embd", "n_layer", "n_head", "n_positions", "n_inner", "resid_pdrop", "vocab_size"):
        assert getattr(loaded, name) == getattr(config, name)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"n_embd": 100, "n_head": 12}, ["n_embd=100", "n_head=12", "96 or 108"]),
        ({"n_embd": 8, "n_head": 12}, ["n_embd=8", "12"]),
        ({"n_layer": 0}, ["n_layer", "0"]),
        ({"n_layer": "12"}, ["n_layer", "'12'"]),
        ({"n_embd": None}, ["n_embd", "None"]),
        ({"vocab_size": -1}, ["vocab_size", "-1"]),
        ({"n_positions": 1.5}, ["n_positions", "1.5"]),
        ({"resid_pdrop": 1.0}, ["resid_pdrop", "1.0"]),
        ({"attn_pdrop": -0.1}, ["attn_pdrop", "-0.1"]),
        ({"layer_norm_epsilon": 0}, ["layer_norm_epsilon", "0"]),
        ({"activation_function": "relu"}, ["activation_function", "relu"]),
    ],
)
def test_invalid_values_are_refused_with_field_and_value(field, words):
    with pytest.raises(ValueError) as error:
        GPT2ReproConfig(**field)
    for word in words:
        assert word in str(error.value)
