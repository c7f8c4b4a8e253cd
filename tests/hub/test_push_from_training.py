"""train.py --push_to_hub."""

import _thread
import signal
import threading
import time

import pytest
from hub_server import TOKEN
from tiny_run import ROOT, clean_environment

import train
from hub import HubError
from hub.push import BackgroundPusher
from training.config import TrainingError, load_config


@pytest.fixture
def environment(server):
    return {"HF_ENDPOINT": server.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


def test_a_run_is_pushed(launch, tiny, server, environment, tmp_path, monkeypatch):
    run = tmp_path / "run"
    options = ("--config", tiny, "--output_dir", run, "--keep_last", 1, "--keep_best", "false")
    hub = ("--push_to_hub", "me/tiny", "--push_every_save", "true")
    server.faults = [("preupload", "slow")]  # step 10 is not removed while it is pushed
    done = launch(*options, *hub, environment=environment)
    assert [title for _, title in server.commits["models/me/tiny"]] == ["Step 10", "Step 20"]
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

    # Nothing is left to do but to push: where that fails, the exit code says so.
    monkeypatch.setattr("os.environ", clean_environment(tmp_path) | {"HF_TOKEN": TOKEN})
    monkeypatch.chdir(ROOT)
    for faults, code in (([("preupload", 400)], 1), ([], 0)):
        server.faults = faults
        assert train.train([*map(str, (*options, "--push_to_hub", "me/tiny", "--resume", "auto"))]) == code


def test_what_cannot_be_pushed_is_said_before_training(launch, tiny, server, environment, tmp_path):
    done = launch(
        *("--config", tiny, "--output_dir", tmp_path / "run", "--push_to_hub", "you/tiny"),
        environment=environment,
        check=False,
    )
    assert done.returncode == 2
    assert "error: the token is me's, who may not write to you's you/tiny" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_settings_that_do_nothing_are_refused():
    with pytest.raises(TrainingError, match="push_to_hub=USER/NAME says where to"):
        load_config(["--push_every_save", "true"])
    with pytest.raises(TrainingError, match="push_every_save needs save_every"):
        load_config(["--push_to_hub", "me/x", "--push_every_save", "true", "--save_every", "null"])


class Hub:
    """A repository's, as slow as it is told to be."""

    name = "me/model"

    def __init__(self):
        self.go_on, self.fails_with = threading.Event(), None

    def push(self, upload):
        self.go_on.wait(10)
        if self.fails_with is not None:
            raise self.fails_with
        return "http://there", []


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.go_on.set()


def test_one_at_a_time_in_the_background(checkpoint, hub):
    """The second is left out while the first is under way, the last is always tried, and a failure is a line."""
    lines = []
    pusher = BackgroundPusher(hub, lines.append)
    pusher.push(checkpoint)
    assert pusher.reading == {checkpoint}
    pusher.push(checkpoint)
    assert lines == [f"not pushed {checkpoint}: the push before it is still under way"]
    hub.go_on.set()
    assert pusher.finish(checkpoint)
    assert lines[1:] == [f"pushed    {checkpoint} to http://there"] * 2
    assert pusher.reading == set()
    for error, why in ((HubError("the network is down"), "the network is down"), (KeyError("a bug"), "KeyError")):
        hub.fails_with = error
        assert not pusher.finish(checkpoint)
        assert lines[-1] == (
            f"warning: {checkpoint} is not on the Hub: {why}. To push it by hand: python -m hub push {checkpoint} "
            "me/model"
        )


@pytest.fixture
def ctrl_c():
    """Ctrl-C means what it means: who is started in a shell's background ignores it, and so do the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_a_push_can_be_given_up(checkpoint, hub):
    """By Ctrl-C, or because the program was asked to stop; what is dropped is said at its end."""
    lines = []
    pusher = BackgroundPusher(hub, lines.append)
    pusher.push(checkpoint)
    began = time.monotonic()
    assert not pusher.finish(checkpoint, is_stopped=lambda: time.monotonic() - began > 0.3)
    threading.Timer(0.3, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        pusher.finish(checkpoint)
    assert time.monotonic() - began < 5
    assert lines == []
    pusher._say_what_is_dropped()
    assert lines == [
        f"warning: {checkpoint} is not on the Hub: the program ended before. To push it by hand: python -m hub push "
        f"{checkpoint} me/model"
    ]
