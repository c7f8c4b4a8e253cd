"""A tiny GPT-2 with GPT-2's real tokenizer, and a Hugging Face Hub on localhost."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from transformers import GPT2Config, GPT2LMHeadModel

from data.tokenizer import load_hf_tokenizer

ROOT = Path(__file__).parents[2]
# The discard port: connections are refused at once, on any machine.
NO_NETWORK = {"HF_ENDPOINT": "http://127.0.0.1:9"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer():
    """GPT-2's own, without network."""
    return load_hf_tokenizer()


@pytest.fixture(scope="session")
def tiny_gpt2():
    torch.manual_seed(0)
    # Large weights, so that each token's probability depends visibly on all before it.
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=128, initializer_range=0.2))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tiny_gpt2, tokenizer):
    """Folder of a model that transformers itself knows."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_gpt2.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def own_checkpoint(tmp_path_factory, tiny_gpt2, tokenizer):
    """Folder of the same model with this project's code in it, as train.py leaves it."""
    from modeling_gpt2repro import GPT2ReproForCausalLM

    folder = tmp_path_factory.mktemp("runs") / "checkpoints" / "step_000100"
    GPT2ReproForCausalLM.from_gpt2(tiny_gpt2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def evaluate_cache(tmp_path_factory):
    """Where `evaluate` copies metrics to, instead of the user's cache."""
    import evaluate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path_factory.mktemp("metrics"))
        yield


@pytest.fixture
def run_python(tmp_path):
    """Runs Python in the checkout, with caches of its own and no network unless `env` gives one."""

    def run(*arguments, **env):
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
                "HF_HOME": str(tmp_path / "hf_home"),
                "PYTHONIOENCODING": "utf-8",
                "OMP_NUM_THREADS": "1",
                **NO_NETWORK,
                **env,
            },
            capture_output=True,
            encoding="utf-8",
            timeout=120,
        )

    return run


@pytest.fixture
def local_hub():
    """
    `local_hub({"datasets/owner/name": {path: bytes}, "models/...": ...})` gives the address of a server that
    answers as the Hub does, as far as `from_pretrained` and `load_dataset` ask.
    """
    with contextlib.ExitStack() as servers:
        yield lambda repos: servers.enter_context(HubServer(repos)).address
