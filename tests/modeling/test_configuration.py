"""GPT2ReproConfig: defaults, aliases, saving, refused values, and the lowest version of transformers."""

import importlib.util
import json

import pytest
import transformers
from transformers import AutoConfig

from modeling_gpt2repro import GPT2ReproConfig, configuration_gpt2repro


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
    fields = {"n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": 64, "resid_pdrop": 0.1, "pad_token_id": 7}
    fields |= {"vocab_size": 50304, "tie_word_embeddings": False, "num_labels": 4}
    GPT2ReproConfig(**fields).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gpt2repro"
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is GPT2ReproConfig
    assert {name: getattr(loaded, name) for name in fields} == fields
    assert loaded.n_inner == 4 * 96


def test_from_size_accepts_other_fields_and_refuses_unknown_sizes():
    assert GPT2ReproConfig.from_size("124M", resid_pdrop=0.1).resid_pdrop == 0.1
    with pytest.raises(ValueError, match=r"124M, 350M, 774M, 1558M.*'117M'"):
        GPT2ReproConfig.from_size("117M")


@pytest.mark.parametrize("version", ["4.57.6", "5.8.2", "5.9.0", "5.10.0.dev0"])
def test_older_transformers_are_refused_on_one_line(version, monkeypatch):
    """The version is simulated. The configuration is the first file of a checkpoint that transformers imports."""
    monkeypatch.setattr(transformers, "__version__", version)
    spec = importlib.util.spec_from_file_location("older", configuration_gpt2repro.__file__)
    module = importlib.util.module_from_spec(spec)
    if version in ("5.9.0", "5.10.0.dev0"):
        spec.loader.exec_module(module)
        return
    monkeypatch.delattr(transformers, "PreTrainedConfig")  # transformers 4 does not have it
    with pytest.raises(ImportError) as error:
        spec.loader.exec_module(module)
    message = str(error.value)
    assert "\n" not in message and version in message and "5.9" in message and "pip install" in message


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
