"""A Hub on localhost for the tests of data, and commands that use it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import constants

from data.sources import sample_documents

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def sample():
    """Return the documents of the offline sample."""
    return list(sample_documents())


@pytest.fixture
def server():
    """A HubServer without repositories."""
    with HubServer({}) as server:
        yield server


@pytest.fixture
def client(server, monkeypatch, tmp_path):
    """Point huggingface_hub in this process at the server."""
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # localhost needs no network
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + template.removeprefix("https://huggingface.co")
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("common.hub.FIRST_PAUSE_SECONDS", 0.01)
    return server


@pytest.fixture
def run_module(tmp_path):
    """run_module("data.prepare", *arguments, **environment) runs a command of ours in a new process."""

    def run(*arguments, **environment):
        own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        done = subprocess.run(
            [sys.executable, "-m", *map(str, arguments)],
            cwd=ROOT,
            env={**own, "HF_HOME": str(tmp_path / "hf_home"), **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.fixture
def run_command(run_module, tmp_path):
    """run_command(*arguments, **environment) runs `python -m data.prepare ... --out tmp_path / "out"`."""
    return lambda *arguments, **environment: run_module(
        "data.prepare", *arguments, "--out", tmp_path / "out", **environment
    )
