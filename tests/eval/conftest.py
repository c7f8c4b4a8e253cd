"""A tiny GPT-2 with GPT-2's real tokenizer, and a Hugging Face Hub on localhost."""

import functools
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
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
    servers = []

    def serve(repos):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_HubHandler, repos))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


class _HubHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    COMMIT = "c" * 40

    def __init__(self, repos, *arguments):
        self.repos = repos
        super().__init__(*arguments)

    def do_GET(self):
        path = self.path.partition("?")[0].strip("/")
        is_api = path.startswith("api/")
        path = path.removeprefix("api/")
        if not path.startswith(("datasets/", "models/")):
            path = f"models/{path}"
        for repo, files in self.repos.items():
            if path.startswith(repo):
                rest = path.removeprefix(repo).strip("/")
                return self._api(rest, files) if is_api else self._file(rest, files)
        return self._reply(404, headers={"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _file(self, rest, files):  # resolve/REVISION/PATH
        name = rest.split("/", 2)[-1]
        if name not in files:
            return self._reply(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.COMMIT})
        etag = hashlib.sha1(files[name]).hexdigest()
        return self._reply(200, files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": self.COMMIT})

    def _api(self, rest, files):
        if rest == f"tree/{self.COMMIT}":
            answer = [
                {"type": "file", "path": name, "size": len(content), "oid": "0" * 40} for name, content in files.items()
            ]
        elif rest.startswith("tree/"):  # a folder: these repositories have none
            return self._reply(404, headers={"X-Error-Code": "EntryNotFound"})
        else:
            answer = {"id": "any", "sha": self.COMMIT, "siblings": [{"rfilename": name} for name in files]}
        return self._reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _reply(self, status, body=b"", headers=None):
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass
