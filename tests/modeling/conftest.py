import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM

TINY = {"n_layer": 3, "n_head": 4, "n_embd": 64, "n_positions": 64}


@pytest.fixture
def tiny_config():
    return GPT2ReproConfig(**TINY)


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    return GPT2ReproForCausalLM(tiny_config)


def make_gpt2(**fields):
    """Create the reference, transformers' GPT-2, with weights large enough for all parts to change the output."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**TINY, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def gpt2():
    return make_gpt2()


@pytest.fixture
def pair(gpt2):
    """Return this project's model and transformers' GPT-2 with the same weights, in evaluation mode."""
    return GPT2ReproForCausalLM.from_gpt2(gpt2), gpt2


@pytest.fixture
def small_pair():
    """Return a pair with 1,000 tokens (the last one is the end of text), for faster tests."""
    gpt2 = make_gpt2(vocab_size=1000, bos_token_id=999, eos_token_id=999)
    return GPT2ReproForCausalLM.from_gpt2(gpt2), gpt2


@pytest.fixture
def input_ids():
    return torch.randint(0, 50257, (3, 48), generator=torch.Generator().manual_seed(1))
