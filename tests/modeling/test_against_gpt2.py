"""Comparison with transformers' GPT-2 and the papers: sizes, dropout, bfloat16, memory of the conversion."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import ROOT
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM

PARAMETERS = {"124M": 124_439_808, "350M": 354_823_168, "774M": 774_030_080, "1558M": 1_557_611_200}


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameter_counts_of_the_four_sizes(size):
    with torch.device("meta"):
        model = GPT2ReproForCausalLM(GPT2ReproConfig.from_size(size))
    model.tie_weights()  # transformers 5.0 does not do this on the meta device
    assert model.num_parameters() == PARAMETERS[size]
    assert model.config.n_embd // model.config.n_head == 64
    assert model.get_input_embeddings().weight.shape[0] == 50257


def test_from_size_accepts_other_fields_and_refuses_unknown_sizes():
    assert GPT2ReproConfig.from_size("124M", resid_pdrop=0.1).resid_pdrop == 0.1
    with pytest.raises(ValueError, match=r"124M, 350M, 774M, 1558M.*'117M'"):
        GPT2ReproConfig.from_size("117M")


@pytest.mark.parametrize("fields", [("embd_pdrop",), ("attn_pdrop",), ("resid_pdrop",), ()])
def test_dropout_is_applied_where_gpt2_applies_it(gpt2, input_ids, fields):
    """With one seed, both models drop the same elements only if they call dropout at the same places."""
    rates = dict.fromkeys(fields or ("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.3)
    reference = GPT2LMHeadModel(GPT2Config(**{**gpt2.config.to_dict(), **rates}))
    reference.load_state_dict(gpt2.state_dict())
    reference.set_attn_implementation("eager")
    model = GPT2ReproForCausalLM.from_gpt2(reference)
    model.set_attn_implementation("eager")
    logits = []
    for candidate in (model.train(), reference.train()):
        torch.manual_seed(3)
        logits.append(candidate(input_ids).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=2e-5, rtol=0)
    with torch.no_grad():
        assert not torch.allclose(model.eval()(input_ids).logits, logits[0], atol=1e-2)  # something was dropped


def test_bf16_error_is_no_larger_than_that_of_transformers(gpt2, input_ids):
    """The two models sum in different orders, so compare their errors relative to float32 logits."""
    model = GPT2ReproForCausalLM.from_gpt2(gpt2).eval()
    with torch.no_grad():
        exact = gpt2.eval()(input_ids).logits
        reference = gpt2.bfloat16()(input_ids).logits.float()
        actual = model.bfloat16()(input_ids).logits.float()
    error = (reference - exact).norm() / exact.norm()
    assert error > 1e-4
    assert (actual - exact).norm() / exact.norm() < 1.5 * error
    assert (actual - reference).norm() / exact.norm() < 2 * error


def test_conversion_peak_memory_is_two_copies():
    """Measure the peak memory of a new process above its initial memory, in copies of the weights."""
    if sys.platform != "linux":
        pytest.skip("resident memory is read from /proc")
    command = [sys.executable, str(Path(__file__).with_name("conversion_memory.py"))]
    run = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    measured = json.loads(run.stdout.splitlines()[-1])
    assert measured["size"] > 5e8
    assert measured["one"] > 0.95  # the first copy was counted
    assert 1.9 < measured["two"] < 2.3, measured
