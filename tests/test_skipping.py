"""Steps whose loss or gradient is not finite, and requests to stop, where numbers are read a step late."""

import json

import pytest
from safetensors.torch import load_file
from tiny_run import ROOT, TWO_PROCESSES

from data.manifest import open_split
from hub.__main__ import main as hub_command

# train.py as on CUDA, where the numbers of a step are read when the next one is under way; with a model whose loss is
# NaN in some micro-batches (two a step), or whose gradient is. HellaSwag's second scoring finds log-likelihoods that
# are not finite, as with a model that has diverged.
PROGRAM = """
import json, os, signal, sys, types, train
train.torch.cuda.Event = lambda: types.SimpleNamespace(record=int, synchronize=int)
set_up = train.StepNumbers.__init__

def set_up_for_cuda(self, device, flops):
    set_up(self, train.torch.device("cuda"), flops)

train.StepNumbers.__init__ = set_up_for_cuda
bad_losses, bad_gradients, signal_after, nan_validations_from = json.loads(sys.argv[1])
forward, calls = train.GPT2ReproForCausalLM.forward, 0

def forward_with_faults(self, *arguments, **more):
    global calls
    output = forward(self, *arguments, **more)
    if self.training:
        if calls in bad_losses:
            output.loss = output.loss * float("nan")
        if calls in bad_gradients:
            output.loss.register_hook(lambda gradient: gradient * float("inf"))
        calls += 1
    return output

answer, scorings = train.answer_items, 0

def answer_with_fault(*arguments, **more):
    global scorings
    scorings += 1
    if scorings == 2:
        raise train.EvalError("log-likelihoods are not finite")
    return answer(*arguments, **more)

validate, validations = train.validation_loss, 0

def validate_with_fault(*arguments, **more):
    global validations
    validations += 1
    loss_sum, num_tokens = validate(*arguments, **more)
    return (float("nan") if validations >= nan_validations_from else loss_sum), num_tokens

train.validation_loss = validate_with_fault
learning_rate = train.learning_rate

def learning_rate_and_signal(step, *arguments):
    if step == signal_after and os.environ.get("RANK", "0") == "0":
        os.kill(os.getpid(), signal.SIGTERM)
    return learning_rate(step, *arguments)

train.learning_rate = learning_rate_and_signal
train.answer_items = answer_with_fault
train.GPT2ReproForCausalLM.forward = forward_with_faults
sys.argv[1:2] = []
if __name__ == "__main__":
    train.main()
"""


@pytest.fixture
def run(launch, tiny, tmp_path):
    def run(*arguments, bad_losses=(), bad_gradients=(), signal_after=None, nan_from=99, accelerate=None):
        (tmp_path / "program.py").write_text(PROGRAM)
        return launch(
            json.dumps([list(bad_losses), list(bad_gradients), signal_after, nan_from]),
            *("--config", tiny, "--output_dir", tmp_path / "run", "--eval.hellaswag_limit", "2", *arguments),
            script=tmp_path / "program.py",
            environment={"PYTHONPATH": str(ROOT)},
            accelerate=accelerate,
            check=False,
        )

    return run


def records(folder):
    return [r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in r]


def test_a_step_is_skipped_counted_and_its_windows_are_written_down(run, tiny, tmp_path):
    done = run("--data.order", "sequential", bad_losses=[2 * 2 + 1], bad_gradients=[2 * 6])  # steps 3 and 7
    assert done.returncode == 0, done.stderr
    steps = records(tmp_path / "run")
    assert [r["step"] for r in steps] == list(range(1, 21))
    assert [r["step"] for r in steps if "skipped" in r] == [3, 7]
    third, seventh = steps[2], steps[6]
    assert third["loss"] is None and third["skipped"]["loss"] == "nan"
    # The second micro-batch of four windows; where only the gradient was not finite, all eight.
    (shard,) = open_split(tiny.parent / "shards", "train")
    places = [{"shard": shard.path.name, "first_token": 32 * window} for window in range(20 * 8)]
    assert third["skipped"]["windows"] == places[2 * 8 + 4 : 3 * 8]
    assert seventh["loss"] is not None and seventh["grad_norm"] is None
    assert seventh["skipped"]["windows"] == places[6 * 8 : 7 * 8]
    assert "step      3 | SKIPPED: loss nan" in done.stdout
    evaluations = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [e["hellaswag"] is None for e in evaluations if "val_loss" in e] == [False, True, False]
    assert "warning: HellaSwag was not scored: log-likelihoods are not finite" in done.stdout
    assert done.stdout.count("\n    'The") == 2  # a model that cannot be scored cannot write either
    assert "skipped 2 steps" in done.stdout
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000020" / "training_state"
    assert json.loads((checkpoint / "state.json").read_text())["num_skipped"] == 2
    moments = load_file(checkpoint / "optimizer.safetensors")
    assert {value.item() for name, value in moments.items() if name.startswith("step.")} == {18.0}
    assert all(value.isfinite().all() for value in moments.values())


def test_too_many_in_a_row_stop_the_run(run, tmp_path):
    done = run("--optim.max_skipped_steps", 3, bad_losses=[2 * 4, *range(2 * 11, 40)])  # step 5; then 12 and on
    assert done.returncode == 1
    assert "the last 3 steps were not finite" in done.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"
    assert "--resume auto" in done.stderr
    assert "Traceback" not in done.stderr
    assert [r["step"] for r in records(tmp_path / "run") if "skipped" in r] == [5, 12, 13, 14]
    assert records(tmp_path / "run")[-1]["step"] == 14

    done = run("--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert "step 10" in done.stdout
    assert [r["step"] for r in records(tmp_path / "run") if "skipped" in r] == [5]


def test_diverged_run_fails_and_its_checkpoint_is_not_shared(run, tmp_path, capsys):
    """The last validation loss is NaN: status "failed", exit code 1, no line about sharing; also when resumed."""
    first = run(nan_from=3)
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


def test_a_checkpoint_knows_of_the_step_just_before_it(run, tmp_path):
    done = run("--save_every", "7", "--eval_every", "20", bad_losses=[2 * 6])  # step 7
    assert done.returncode == 0, done.stderr
    path = tmp_path / "run" / "checkpoints" / "step_000007" / "training_state" / "state.json"
    state = json.loads(path.read_text())
    assert (state["num_skipped"], state["skipped_in_a_row"]) == (1, 1)


@pytest.mark.parametrize(
    ("accelerate", "last_step"),
    [(None, 5), (TWO_PROCESSES, 6)],  # the other one hears of it with a step's numbers, which come with the next step
)
def test_a_request_to_stop_flushes_what_waits(run, tmp_path, accelerate, last_step):
    done = run("--batch.micro_batch_size", "2", signal_after=4, accelerate=accelerate)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "resume me", done.stderr
    assert [r["step"] for r in records(tmp_path / "run")] == list(range(1, last_step + 1))
    assert (tmp_path / "run" / "checkpoints" / f"step_{last_step:06}").is_dir()
    assert "SIGTERM" in done.stdout
