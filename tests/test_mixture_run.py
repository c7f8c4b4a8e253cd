"""A run on a mixture of three folders: what it logs, and how it is stopped, killed, resumed and refused."""

import json
import random
import signal

import pytest
from killing import assert_same_run, kill_at_random, status
from tiny_run import records

import train
from data.manifest import open_split
from data.shards import write_shard
from training import TrainingError
from training.logging import RunLog
from training.run import EXIT_RESUME

STEPS = 20
OPTIONS = (
    *("--max_steps", STEPS, "--save_every", 6, "--eval_every", 10, "--model.dropout", 0.1, "--eval.hellaswag", "null"),
    *("--eval.prompts", "[]", "--eval.ngram_baselines", "true"),
)


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """Three folders of shards, the last one small enough to be read more than four times."""
    root = tmp_path_factory.mktemp("mix")
    train_tokens, val_tokens = (open_split(tiny.parent / "shards", split)[0][:] for split in ("train", "val"))
    for name, first, end in (("a", 0, 4000), ("b", 4000, 7000), ("c", 7000, 7200)):
        (root / name).mkdir()
        write_shard(root / name / f"{name}_train_000001.bin", train_tokens[first:end])
        write_shard(root / name / f"{name}_val_000000.bin", val_tokens[first // 4 : first // 4 + 400])
    return [root / name for name in "abc"]


def arguments(tiny, folders, weights=(0.5, 0.3, 0.2)):
    mix = ", ".join(f"{folder}: {weight}" for folder, weight in zip(folders, weights, strict=True))
    return [str(argument) for argument in ("--config", tiny, *OPTIONS, "--data.mix", f"{{{mix}}}")]


@pytest.fixture(scope="module")
def undisturbed(tiny, folders, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train.train([*arguments(tiny, folders), "--output_dir", str(output)]) == 0
    return output


def test_losses_and_provenance_are_by_folder(undisturbed, folders):
    evaluations = records(undisturbed, "val_loss")
    assert len(evaluations) == 3
    for record in evaluations:
        assert [*record["val_losses"]] == [str(folder) for folder in folders]
        a, b, c = record["val_losses"].values()
        assert record["val_loss"] == pytest.approx(0.5 * a + 0.3 * b + 0.2 * c)
    data = json.loads((undisturbed / "provenance.json").read_text())["data"]
    assert [source["weight"] for source in data["sources"].values()] == [0.5, 0.3, 0.2]
    assert (undisturbed / "curves.png").exists()


def test_stopped_run_resumes_bit_for_bit(tiny, folders, undisturbed, tmp_path, monkeypatch, capsys):
    command = [*arguments(tiny, folders), "--output_dir", str(tmp_path / "run"), "--resume", "auto"]
    log_step = RunLog.log_step

    def stop_after_step_9(self, state, **values):
        log_step(self, state, **values)
        if state.step == 9:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "log_step", stop_after_step_9)
        assert train.train(command) == EXIT_RESUME
    step = status(tmp_path / "run")["step"]
    assert 9 <= step < STEPS
    assert train.train(command) == 0
    printed = capsys.readouterr().out
    for folder, weight in zip(folders, (0.5, 0.3, 0.2), strict=True):
        assert f"data      {folder}: weight {weight}, " in printed
    assert f"warning: each training token of {folders[2]} is seen" in printed
    assert "val loss" in printed and f"({folders[0]} " in printed
    assert_same_run(tmp_path / "run", undisturbed, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_run_resumes_bit_for_bit(tiny, folders, tmp_path, seed):
    """The reference is a process with one thread, too."""
    for name, times in (("reference", 0), ("killed", 4)):
        kill_at_random(
            *(tmp_path / name, tmp_path, *arguments(tiny, folders)),
            random=random.Random(seed),
            most_seconds=1.0,
            times=times,
        )
    assert_same_run(tmp_path / "killed", tmp_path / "reference", STEPS)


def test_resuming_with_other_weights_is_refused(tiny, folders, undisturbed, tmp_path):
    resume = ["--resume", str(undisturbed / "checkpoints" / "step_000012"), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(
        TrainingError, match=r"the weights of data.mix=\[0.5, 0.3, 0.2\], this run has \[0.5, 0.2, 0.3\]"
    ):
        train.train([*arguments(tiny, folders, weights=(5, 2, 3)), *resume])
    with pytest.raises(TrainingError, match="it was trained on other data"):
        train.train([*arguments(tiny, [folders[1], folders[0], folders[2]]), *resume])
