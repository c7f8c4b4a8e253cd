"""Conversion from and to transformers' GPT-2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import ROOT
from transformers import GPT2LMHeadModel, GPT2Model

from modeling_gpt2repro import GPT2ReproForCausalLM


def test_round_trip_is_bit_exact(gpt2):
    back = GPT2ReproForCausalLM.from_gpt2(gpt2).to_gpt2()
    assert type(back) is GPT2LMHeadModel
    before, after = gpt2.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    assert back.lm_head.weight is back.transformer.wte.weight


def test_converted_model_shares_no_memory_with_the_source(gpt2):
    model = GPT2ReproForCausalLM.from_gpt2(gpt2)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(p.abs().sum() > 0 for p in gpt2.parameters())


def test_conversion_through_folders_keeps_the_logits(gpt2, input_ids, tmp_path):
    gpt2.eval().save_pretrained(tmp_path / "gpt2")
    model = GPT2ReproForCausalLM.from_gpt2(tmp_path / "gpt2").eval()
    assert model.lm_head.weight is model.transformer.wte.weight
    model.save_pretrained(tmp_path / "gpt2repro")
    GPT2ReproForCausalLM.from_pretrained(tmp_path / "gpt2repro").to_gpt2().save_pretrained(tmp_path / "back")
    back = GPT2LMHeadModel.from_pretrained(tmp_path / "back")
    with torch.no_grad():
        assert torch.equal(back(input_ids).logits, gpt2(input_ids).logits)


def test_conversion_keeps_kernel_dtype_and_generation_config(gpt2, input_ids):
    gpt2.set_attn_implementation("eager")
    gpt2.generation_config.max_new_tokens = 7
    model = GPT2ReproForCausalLM.from_gpt2(gpt2.bfloat16().eval())
    back = model.to_gpt2()
    for converted in (model, back):
        assert converted.config._attn_implementation == "eager"
        assert converted.generation_config.max_new_tokens == 7
        assert converted.generation_config is not gpt2.generation_config
        assert converted.dtype is torch.bfloat16
        assert not converted.training
    assert torch.equal(back(input_ids).logits, gpt2(input_ids).logits)


def test_untied_gpt2_stays_untied(gpt2, input_ids):
    gpt2.config.tie_word_embeddings = False
    gpt2.lm_head.weight = torch.nn.Parameter(gpt2.lm_head.weight.detach() + 1)
    model = GPT2ReproForCausalLM.from_gpt2(gpt2.eval())
    assert model.lm_head.weight is not model.transformer.wte.weight
    with torch.no_grad():
        assert torch.equal(model.to_gpt2()(input_ids).logits, gpt2(input_ids).logits)


def test_unsupported_models_are_refused(gpt2):
    with pytest.raises(ValueError, match="GPT2Model"):
        GPT2ReproForCausalLM.from_gpt2(GPT2Model(gpt2.config))
    bidirectional = GPT2ReproForCausalLM.from_gpt2(gpt2)
    bidirectional.config.is_causal = False
    with pytest.raises(ValueError, match="is_causal=False"):
        bidirectional.to_gpt2()
    gpt2.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx=True"):
        GPT2ReproForCausalLM.from_gpt2(gpt2)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_conversion_peak_memory_is_two_copies():
    """Measure the peak memory of a new process above its initial memory, in copies of the weights."""
    command = [sys.executable, str(Path(__file__).with_name("conversion_memory.py"))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    measured = json.loads(run.stdout.splitlines()[-1])
    assert measured["size"] > 5e8
    assert measured["one"] > 0.95  # the first copy was counted
    assert 1.9 < measured["two"] < 2.3, measured
