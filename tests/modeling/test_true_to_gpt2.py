"""The four sizes, dropout's places, bfloat16, conversion at scale: against transformers' GPT-2 and the papers."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM

PARAMETERS = {"124M": 124_439_808, "350M": 354_823_168, "774M": 774_030_080, "1558M": 1_557_611_200}


@pytest.mark.parametrize("size", PARAMETERS)
def test_the_four_sizes_have_their_parameters(size):
    with torch.device("meta"):
        model = GPT2ReproForCausalLM(GPT2ReproConfig.from_size(size))
    model.tie_weights()  # transformers 5.0 leaves that out on the meta device
    assert model.num_parameters() == PARAMETERS[size]
    assert model.config.n_embd // model.config.n_head == 64
    assert model.get_input_embeddings().weight.shape[0] == 50257


def test_from_size_takes_other_fields_and_refuses_other_sizes():
    assert GPT2ReproConfig.from_size("124M", resid_pdrop=0.1).resid_pdrop == 0.1
    with pytest.raises(ValueError, match=r"124M, 350M, 774M, 1558M.*'117M'"):
        GPT2ReproConfig.from_size("117M")


@pytest.mark.parametrize("fields", [("embd_pdrop",), ("attn_pdrop",), ("resid_pdrop",), ()])
def test_dropout_falls_in_the_same_places(gpt2, input_ids, fields):
    """The same seed drops the same elements in the same order of calls only if the places are the same."""
    rates = dict.fromkeys(fields or ("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.3)
    theirs = GPT2LMHeadModel(GPT2Config(**{**gpt2.config.to_dict(), **rates}))
    theirs.load_state_dict(gpt2.state_dict())
    theirs.set_attn_implementation("eager")
    ours = GPT2ReproForCausalLM.from_gpt2(theirs)
    ours.set_attn_implementation("eager")
    logits = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(3)
        logits.append(model(input_ids).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=2e-5, rtol=0)
    with torch.no_grad():
        assert not torch.allclose(ours.eval()(input_ids).logits, logits[0], atol=1e-2)  # something was dropped


def test_bf16_is_as_far_from_float32_as_transformers_is(gpt2, input_ids):
    """Two orders of summation round differently, neither may be worse: errors are compared, in float32's units."""
    ours = GPT2ReproForCausalLM.from_gpt2(gpt2).eval()
    with torch.no_grad():
        exact = gpt2.eval()(input_ids).logits
        theirs = gpt2.bfloat16()(input_ids).logits.float()
        mine = ours.bfloat16()(input_ids).logits.float()
    error = (theirs - exact).norm() / exact.norm()
    assert error > 1e-4
    assert (mine - exact).norm() / exact.norm() < 1.5 * error
    assert (mine - theirs).norm() / exact.norm() < 2 * error


def test_conversion_holds_no_more_than_two_copies():
    """Peak memory of a fresh process, over what it held before, in copies of the weights."""
    program = r"""
import json, re, torch
from transformers import GPT2Config, GPT2LMHeadModel
from modeling_gpt2repro import GPT2ReproForCausalLM
from modeling_gpt2repro.conversion import from_gpt2
torch.set_num_threads(1)
def memory(what):  # not getrusage, whose peak a process inherits from the one that started it
    return 1024 * int(re.search(what + r":\s+(\d+) kB", open("/proc/self/status").read())[1])
before = memory("VmRSS")
gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=20, n_embd=640, n_head=10))
copy = sum(p.numel() * p.element_size() for p in gpt2.parameters())
one = memory("VmRSS") - before
model = GPT2ReproForCausalLM.from_gpt2(gpt2)
two = memory("VmHWM") - before
print(json.dumps({"copy": copy, "one": one / copy, "two": two / copy}))
"""
    if sys.platform != "linux":
        pytest.skip("resident memory is read from /proc")
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    measured = json.loads(run.stdout.splitlines()[-1])
    assert measured["copy"] > 5e8
    assert measured["one"] > 0.95  # the first copy was seen
    assert 1.9 < measured["two"] < 2.3, measured
