"""Steps whose loss or gradient is not finite, and requests to stop, are handled at their step."""

import json

import pytest
from safetensors.torch import load_file
from tiny_run import ROOT, TWO_PROCESSES, records

from data.manifest import open_split
from hub.__main__ import main as hub_command


@pytest.fixture
def run(launch, small, tmp_path):
    """run(*arguments, accelerate=None, **faults): train.py with faults, see faulty_training.py."""

    def run(*arguments, accelerate=None, **faults):
        return launch(
            json.dumps(faults),
            *("--config", small, "--output_dir", tmp_path / "run", "--eval.hellaswag_limit", "2", *arguments),
            script=ROOT / "tests" / "faulty_training.py",
            environment={"PYTHONPATH": str(ROOT)},
            accelerate=accelerate,
            check=False,
        )

    return run


def read_state(folder, step):
    return json.loads((folder / "checkpoints" / f"step_{step:06d}" / "training_state" / "state.json").read_text())


def test_skipped_step_changes_nothing_and_its_windows_are_logged(run, small, tmp_path):
    """Steps 3 and 7 of 20; the checkpoint of step 7 has the count. HellaSwag's second scoring fails as well."""
    faults = {"nan_losses": [2 * 2 + 1], "inf_gradients": [2 * 6], "failed_scorings": [1]}
    done = run("--data.order", "sequential", "--save_every", "7", **faults)
    assert done.returncode == 0, done.stderr
    steps = records(tmp_path / "run", "loss")
    assert [r["step"] for r in steps] == list(range(1, 21))
    assert [r["step"] for r in steps if "skipped" in r] == [3, 7]
    third, seventh = steps[2], steps[6]
    assert third["loss"] is None and third["skipped"]["loss"] == "nan"
    # The four windows of the second micro-batch; all eight where only the gradient is not finite.
    (shard,) = open_split(small.parent / "shards", "train")
    windows = [{"shard": shard.path.name, "first_token": 32 * window} for window in range(20 * 8)]
    assert third["skipped"]["windows"] == windows[2 * 8 + 4 : 3 * 8]
    assert seventh["loss"] is not None and seventh["grad_norm"] is None
    assert seventh["skipped"]["windows"] == windows[6 * 8 : 7 * 8]
    assert "step      3 | SKIPPED: loss nan" in done.stdout
    assert "skipped 2 steps" in done.stdout
    evaluations = records(tmp_path / "run", "val_loss")
    assert [e["hellaswag"] is None for e in evaluations] == [False, True, False]
    assert "warning: hellaswag was not scored: log-likelihoods are not finite\n" in done.stdout
    assert done.stdout.count("\n    'The") == 2  # no samples where the scoring failed
    state = read_state(tmp_path / "run", 7)  # saved just after a skipped step
    assert (state["num_skipped"], state["consecutive_skips"]) == (2, 1)
    assert read_state(tmp_path / "run", 20)["num_skipped"] == 2
    moments = load_file(tmp_path / "run" / "checkpoints" / "step_000020" / "training_state" / "optimizer.safetensors")
    assert {value.item() for name, value in moments.items() if name.startswith("step.")} == {18.0}
    assert all(value.isfinite().all() for value in moments.values())


def test_too_many_consecutive_skips_stop_the_run(run, tmp_path):
    bad_losses = [2 * 4, *range(2 * 11, 40)]  # step 5; all from step 12 on
    done = run("--optim.max_skipped_steps", 3, nan_losses=bad_losses)
    assert done.returncode == 1
    assert "step 14" in done.stderr and "--resume auto" in done.stderr and "Traceback" not in done.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"
    steps = records(tmp_path / "run", "loss")
    assert [r["step"] for r in steps if "skipped" in r] == [5, 12, 13, 14]
    assert steps[-1]["step"] == 14

    done = run("--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert "step 10" in done.stdout
    assert [r["step"] for r in records(tmp_path / "run", "skipped")] == [5]


def test_diverged_run_fails_and_its_checkpoint_is_not_shared(run, tmp_path, capsys):
    """The last validation loss is NaN: status "failed", exit code 1, no line about sharing; also when resumed."""
    first = run(nan_validations=[2])
    output = tmp_path / "run"
    checkpoint = output / "checkpoints" / "step_000020"
    for done in (first, run("--resume", "auto")):
        assert done.returncode == 1, done.stderr
        assert "not finite: the training diverged" in done.stderr
        assert str(checkpoint) in done.stderr and "optim.lr" in done.stderr
        assert "hub push" not in done.stdout and "Traceback" not in done.stderr
        assert json.loads((output / "status.json").read_text())["status"] == "failed"
    assert hub_command(["push", str(checkpoint), "me/x", "--dry_run"]) == 2
    assert "diverged" in capsys.readouterr().err


@pytest.mark.parametrize("accelerate", [None, TWO_PROCESSES], ids=["one process", "two processes"])
def test_stop_request_ends_the_run_at_its_step(run, tmp_path, accelerate):
    """The signal comes in step 5, to the main process alone."""
    done = run("--batch.micro_batch_size", "2", sigterm_at=4, accelerate=accelerate)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "resume me", done.stderr
    assert [r["step"] for r in records(tmp_path / "run", "loss")] == [1, 2, 3, 4, 5]
    assert (tmp_path / "run" / "checkpoints" / "step_000005").is_dir()
    assert "SIGTERM" in done.stdout
