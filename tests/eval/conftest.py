"""A tiny GPT-2 with GPT-2's real tokenizer, and a Hugging Face Hub on localhost."""

import contextlib

import pytest
import torch
from hub_server import HubServer
from transformers import GPT2Config, GPT2LMHeadModel

from data.tokenizer import GPT2
from modeling_gpt2repro import GPT2ReproForCausalLM


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread: models this small are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer():
    """Load GPT-2's tokenizer without a network."""
    return GPT2.hf()


@pytest.fixture(scope="session")
def tiny_gpt2():
    """Make a tiny GPT-2 with large weights: each token's probability depends visibly on all tokens before it."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=128, initializer_range=0.2))


@pytest.fixture(scope="session")
def model(tiny_gpt2):
    """Make the same model as this project's."""
    return GPT2ReproForCausalLM.from_gpt2(tiny_gpt2).eval()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tiny_gpt2, tokenizer):
    """Save the tiny GPT-2 as a model of transformers' own, and return the folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_gpt2.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def own_checkpoint(tmp_path_factory, model, tokenizer):
    """Save the same model with this project's code, as train.py does, and return the folder."""
    folder = tmp_path_factory.mktemp("runs") / "checkpoints" / "step_000100"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run_python(launch, tmp_path):
    """Return a function that runs Python in the checkout with its own cache, and no network unless `env` has one."""
    own = {"HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_OFFLINE": "0", "PYTHONIOENCODING": "utf-8"}
    own["HF_ENDPOINT"] = "http://127.0.0.1:9"  # the discard port: connections are refused at once

    def run(script, *arguments, **env):
        return launch(*arguments, script=script, check=False, environment=own | env)

    return run


@pytest.fixture
def local_hub():
    """
    Return a function that starts a Hub on localhost and returns its address.

    `local_hub({"datasets/owner/name": {path: bytes}, "models/...": ...})` serves what `from_pretrained` and
    `load_dataset` request.
    """
    with contextlib.ExitStack() as servers:
        yield lambda repos: servers.enter_context(HubServer(repos)).address
