"""
Every machine: the conditions of Windows, network disks, cloud drives and small consoles, simulated on Linux.

A short run, its evaluation, sampling, export and push live through each of them, and through all at once.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import conditions
import pytest
from hub_server import TOKEN, HubServer
from huggingface_hub import constants
from tiny_run import ROOT, clean_environment

import train
from common import cli
from common.checkpoints import resolve_checkpoint, resolve_checkpoints
from common.errors import UserError
from common.files import atomic_write, flush_to_disk, replace_file
from data import prepare
from eval import __main__ as evaluation
from hub import __main__ as hub
from training import TrainingError, run_folder
from training.stopping import StopRequest

SHORT = (
    *("--max_steps", 4, "--eval_every", 2, "--save_every", 2, "--keep_last", 1, "--eval.hellaswag_limit", 2),
    *("--eval.prompts", "[Grüße]"),  # no ASCII, and not in every console
)


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub on localhost, for this process and those that it starts."""
    with HubServer({}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def commands(tiny, folder):
    """(main, arguments) of each step: data, a run, a run in the same folder, and what is done with its checkpoint."""
    run, best = folder / "rün", folder / "rün" / "checkpoints" / "best"
    options = ("--config", tiny, "--output_dir", run, "--data.path", folder / "dätä", *SHORT)
    text = tiny.parent / "tiny.jsonl"
    return [
        (prepare.main, ("files", text, "--out", folder / "dätä", "--num_proc", 1, "--val_fraction", 0.2)),
        (train.train, options),
        (train.train, (*options, "--max_steps", 6, "--resume", best)),
        (evaluation.main, ("--model", best, "--data", "sample", "--limit", 2, "--output", folder / "scöres.json")),
        (sample_main, (best, "Grüße", "--max_new_tokens", 3)),
        (hub.main, ("export", best, "--to", "gpt2", "--out", folder / "pläin")),
        (hub.main, ("push", best, "me/model", "--results", folder / "scöres.json")),
    ]


def sample_main(arguments):
    import sample

    return sample.main(arguments)


def check_outcome(folder, server):
    """What the commands leave is right: one whole checkpoint, finished, exported, pushed."""
    run = folder / "rün"
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_000006"]
    assert json.loads((folder / "scöres.json").read_text())["results"]["hellaswag"]["n"] == 2
    files = server.repos["models/me/model"]
    assert files["model.safetensors"] == (run / "checkpoints" / "step_000006" / "model.safetensors").read_bytes()
    assert (folder / "pläin" / "model.safetensors").is_file()
    assert not list(folder.rglob("*.partial"))


@pytest.mark.parametrize("condition", conditions.ALL, ids=lambda condition: condition.__name__)
def test_everything_lives_through(condition, tiny, server, tmp_path, capfd):
    with condition():
        for main, arguments in commands(tiny, tmp_path):
            t0 = time.perf_counter(), time.process_time()
            assert main([*map(str, arguments)]) == 0, capfd.readouterr()
            print("TIME", main.__module__, arguments[0], time.perf_counter() - t0[0], time.process_time() - t0[1], file=sys.__stderr__)
    check_outcome(tmp_path, server)
    captured = capfd.readouterr()
    # Said once by the run and once by the preparation, whose disk is the same: once in a process.
    expected = 1 if condition is conditions.no_locks else 0
    assert (captured.out + captured.err).count("has no locks") <= expected
    assert "could not be put in order" not in captured.out
    for folder in (tmp_path / "rün" / "checkpoints", tmp_path / "pläin"):
        mode = 0o666 & ~(0o027 if condition is conditions.umask_027 else os.umask(os.umask(0o022)) or 0o022)
        assert conditions.modes(folder) == {oct(mode)}
