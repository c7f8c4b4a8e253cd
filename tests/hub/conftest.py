"""A checkpoint in a run, as train.py writes it, and a Hub on localhost to push it to."""

import json
import shutil

import pytest
import torch
from hub_server import TOKEN, HubServer
from huggingface_hub import constants

from common.checkpoints import describe_file
from common.errors import UserError
from data.tokenizer import GPT2
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """The models here are so small that more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model():
    """A model with random weights, large enough to write texts that do not repeat one token."""
    torch.manual_seed(0)
    config = GPT2ReproConfig(n_layer=2, n_head=4, n_embd=64, n_positions=128, initializer_range=0.2)
    return GPT2ReproForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tokenizer():
    return GPT2.hf(model_max_length=128)


def write_manifest(checkpoint):
    """Write the manifest of a checkpoint's files, as training/checkpoint.py does."""
    manifest = checkpoint / "training_state" / "manifest.json"
    manifest.unlink(missing_ok=True)
    paths = [path for path in checkpoint.rglob("*") if path.is_file()]
    files = {path.relative_to(checkpoint).as_posix(): describe_file(path) for path in paths}
    manifest.write_text(json.dumps({"files": files}))


@pytest.fixture(name="write_manifest")
def write_manifest_fixture():
    return write_manifest


PROVENANCE = {
    "config": {
        "max_steps": 20,
        "seed": 1337,
        "batch": {"tokens_per_step": 256},
        "data": {"path": "/home/some one/shards/fineweb-edu"},
        "eval": {"val_tokens": 4096, "hellaswag": "runs/secret/items.jsonl", "task_data": {"core": "runs/secret/core"}},
        "init_from": None,
        "output_dir": "/home/some one/runs/tiny",
    },
    "data": {
        "train_tokens": 100_000,
        "val_tokens": 10_000,
        "manifest_sha256": "a" * 64,
        "source": {
            "kind": "hub",
            "dataset": "HuggingFaceFW/fineweb-edu",
            "subset": "sample-10BT",
            "revision": "b" * 40,
        },
    },
    "code": {"commit": "e" * 40, "dirty": True},
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "hardware": {"device": "NVIDIA H100", "processes": 8, "mixed_precision": "bf16", "dollars_an_hour": 3.0},
}
HELLASWAG = {"acc": 0.28, "acc_norm": 0.2955, "acc_norm_stderr": 0.0046, "n": 10042, "is_sample": False}


@pytest.fixture(scope="session")
def run_folder(model, tokenizer, tmp_path_factory):
    """Folder of a run with one checkpoint. Tests that change it copy it."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    checkpoint = run / "checkpoints" / "step_000020"
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    (checkpoint / "training_state").mkdir()
    (checkpoint / "training_state" / "state.json").write_text(json.dumps({"step": 20, "tokens": 5120}))
    (checkpoint / "training_state" / "optimizer.safetensors").write_bytes(b"the moments")
    write_manifest(checkpoint)
    (run / "provenance.json").write_text(json.dumps(PROVENANCE))
    records = [{"step": step, "loss": 10.0, "ms": 180_000.0} for step in range(1, 21)]
    records.append({"step": 20, "val_loss": 3.2924, "hellaswag": HELLASWAG, "seconds": 0.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "curves.png").write_bytes(b"\x89PNG of curves")
    return run


@pytest.fixture
def copied(run_folder, tmp_path):
    """A copy of the checkpoint, in a run of its own, that a test may change."""
    shutil.copytree(run_folder, tmp_path / "runs" / "copy")
    return tmp_path / "runs" / "copy" / "checkpoints" / "step_000020"


@pytest.fixture
def standalone(copied):
    """A copy of the checkpoint outside any run."""
    folder = copied.parents[2] / "standalone"
    copied.rename(folder)
    shutil.rmtree(folder / "training_state")
    return folder


@pytest.fixture(scope="session")
def checkpoint(run_folder):
    return run_folder / "checkpoints" / "step_000020"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """An empty Hub on localhost, to which this process is logged in as the user `me`."""
    with HubServer({}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # localhost needs no network
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its storage is not on localhost
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("common.hub.FIRST_PAUSE_SECONDS", 0.01)
        yield server


@pytest.fixture
def environment(server):
    """Variables for other processes, which then know only this Hub."""
    return {"HF_ENDPOINT": server.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


@pytest.fixture
def trust_requests(monkeypatch):
    """trust_requests(module): trust_remote_code of each loader that the module calls; the second raises."""

    def patch(module):
        requests = []

        def load(name, *, trust_remote_code, **_):
            requests.append(trust_remote_code)
            if len(requests) == 2:
                raise UserError("stop here")
            return None, None

        monkeypatch.setattr(module, "load_tokenizer", load)
        monkeypatch.setattr(module, "load_model", load)
        return requests

    return patch
