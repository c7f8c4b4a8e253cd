"""train.py --push_to_hub."""

import _thread
import threading
import time

import pytest
from hub_server import TOKEN
from tiny_run import ROOT, clean_environment

import train
from hub import HubError
from hub.push import push_last_checkpoint
from training.config import TrainingError, load_config


def test_run_is_pushed(launch, small, server, environment, tmp_path, monkeypatch):
    run = tmp_path / "run"
    options = ("--config", small, "--output_dir", run, "--keep_last", 1, "--keep_best", "false")
    done = launch(*options, "--push_to_hub", "me/tiny", environment=environment)
    assert [title for _, title in server.commits["models/me/tiny"]] == ["Step 20"]
    assert "pushed    " in done.stdout.splitlines()[-1]
    assert server.private == {"models/me/tiny"}
    files = server.repos["models/me/tiny"]
    last = run / "checkpoints" / "step_000020"
    assert files["model.safetensors"] == (last / "model.safetensors").read_bytes()
    assert files["curves.png"] == (run / "curves.png").read_bytes()
    assert "step 20 of 20" in files["README.md"].decode() and "validation loss" in files["README.md"].decode()
    assert TOKEN not in done.stdout + done.stderr
    for path in run.rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes()

    # The run is finished and only the push is left: the exit code is that of the push.
    monkeypatch.setattr("os.environ", clean_environment(tmp_path) | {"HF_TOKEN": TOKEN})
    monkeypatch.chdir(ROOT)
    for faults, code in (([("preupload", 400)], 1), ([], 0)):
        server.faults = faults
        assert train.train([*map(str, (*options, "--push_to_hub", "me/tiny", "--resume", "auto"))]) == code


def test_missing_write_access_is_found_before_training(small, server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.environ", clean_environment(tmp_path) | {"HF_TOKEN": TOKEN})
    monkeypatch.chdir(ROOT)
    options = ("--config", small, "--output_dir", tmp_path / "run", "--push_to_hub", "you/tiny")
    assert train.main([*map(str, options)]) == 2
    error = capsys.readouterr().err
    assert "error: the token belongs to me, who may not write to you's you/tiny" in error
    assert "Traceback" not in error and not (tmp_path / "run").exists()


def test_settings_without_effect_are_rejected():
    with pytest.raises(TrainingError, match="push_to_hub=USER/NAME"):
        load_config(["--push_public", "true"])
    for argument in ("--push_every_save", "--push_every_save=false"):
        with pytest.raises(TrainingError, match="push_every_save was removed"):
            load_config(["--push_to_hub", "me/x", argument])


class SlowRepository:
    """A repository whose push takes until `release` is set, and then raises `error`."""

    repo_id, error, is_private = "me/model", None, True

    def __init__(self):
        self.release = threading.Event()

    def push(self, plan):
        self.release.wait(10)
        raise self.error


@pytest.fixture
def repository():
    repository = SlowRepository()
    yield repository
    repository.release.set()


def by_hand(checkpoint, reason):
    command = f"python -m hub push {checkpoint} me/model"
    return f"warning: {checkpoint} is not on the Hub: {reason}. To push it by hand: {command}"


@pytest.mark.parametrize(
    ("error", "reason"), [(HubError("the network is down"), "the network is down"), (KeyError("a bug"), "KeyError")]
)
def test_failed_push_is_a_warning_with_the_command(checkpoint, repository, error, reason, capsys):
    repository.release.set()
    repository.error = error
    assert not push_last_checkpoint(repository, checkpoint)
    repository.is_private = False
    assert not push_last_checkpoint(repository, checkpoint)
    line = by_hand(checkpoint, reason)
    assert capsys.readouterr().out.splitlines() == [line, f"{line} --public"]


def test_stop_request_and_ctrl_c_end_a_push(checkpoint, repository, capsys):
    began = time.monotonic()
    is_late = lambda: time.monotonic() - began > 0.3  # noqa: E731
    assert not push_last_checkpoint(repository, checkpoint, should_stop=is_late)
    threading.Timer(0.3, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        push_last_checkpoint(repository, checkpoint)
    assert time.monotonic() - began < 5
    assert capsys.readouterr().out.splitlines() == [by_hand(checkpoint, "the program ended before the push did")] * 2
