"""train.py --push_to_hub."""

import threading

import pytest
from hub_server import TOKEN

from hub import HubError
from hub.push import BackgroundPusher, Repository
from training.config import TrainingError, load_config


@pytest.fixture
def environment(server):
    return {"HF_ENDPOINT": server.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


def test_a_run_is_pushed(launch, tiny, server, environment, tmp_path):
    run = tmp_path / "run"
    options = ("--config", tiny, "--output_dir", run, "--keep_last", 1, "--keep_best", "false")
    hub = ("--push_to_hub", "me/tiny", "--push_every_save", "true")
    done = launch(*options, *hub, environment=environment)
    titles = [title for _, title in server.commits["models/me/tiny"]]
    assert titles[-1] == "Step 20" and set(titles) <= {"Step 10", "Step 20"}
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


def test_what_cannot_be_pushed_is_said_before_training(launch, tiny, server, environment, tmp_path):
    done = launch(
        *("--config", tiny, "--output_dir", tmp_path / "run", "--push_to_hub", "you/tiny"),
        environment=environment,
        check=False,
    )
    assert done.returncode == 1
    assert "error: this machine's token may not write to you/tiny" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_settings_that_do_nothing_are_refused():
    with pytest.raises(TrainingError, match="push_to_hub=USER/NAME says where to"):
        load_config(["--push_every_save", "true"])
    with pytest.raises(TrainingError, match="push_every_save needs save_every"):
        load_config(["--push_to_hub", "me/x", "--push_every_save", "true", "--save_every", "null"])


def test_one_at_a_time_in_the_background(checkpoint, server, monkeypatch):
    """The second is left out while the first is under way, the last is always tried, and a failure is a line."""
    lines, go_on, repository = [], threading.Event(), Repository("me/model")
    pusher = BackgroundPusher(repository, lines.append)
    push = repository.push

    def slow(upload):
        go_on.wait(10)
        return push(upload)

    monkeypatch.setattr(repository, "push", slow)
    pusher.push(checkpoint)
    assert pusher.reading == {checkpoint}
    pusher.push(checkpoint)
    assert lines == [f"not pushed {checkpoint}: the push before it is still under way"]
    go_on.set()
    assert pusher.finish(checkpoint)
    assert lines[1:] == [lines[1]] * 2 and lines[1].startswith(f"pushed    {checkpoint} to http://127.0.0.1")
    assert pusher.reading == set()

    def fails(upload):
        raise HubError("the network is down")

    monkeypatch.setattr(repository, "push", fails)
    assert not pusher.finish(checkpoint)
    assert lines[-1] == (
        f"warning: {checkpoint} is not on the Hub: the network is down. To push it by hand: python -m hub push "
        f"{checkpoint} me/model"
    )
