"""train.py as a user meets it: launched, looked at, resumed, started on two processes."""

import html
import json
import math
import os
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conditions import modes
from fresh_process import run_on_terminal
from plain_loop import initial_gpt2, train_by_hand
from safetensors.torch import load_file
from tiny_run import RECIPE, ROOT, TWO_PROCESSES, clean_environment, losses, records, scored_task
from transformers import GPT2Config, GPT2LMHeadModel

import train
from data.manifest import needs_preparing, read_manifest
from data.permutation import Permutation
from data.prepare import prepare_sample
from modeling_gpt2repro import GPT2ReproForCausalLM
from training.checkpoint import run_folder_of
from training.provenance import earlier_launches


def test_a_run_leaves_what_it_promises(finished_run):
    output, console = finished_run
    assert {p.name for p in (output / "checkpoints").iterdir()} == {"step_000010", "step_000020"}
    for name in ("curves.png", "report.html", "provenance.json", "metrics.jsonl", "tensorboard", "status.json"):
        assert (output / name).exists(), name
    assert not list(output.rglob(".*.partial"))

    training, evaluations = records(output, "loss"), records(output, "val_loss")
    assert [r["step"] for r in training] == list(range(1, 21))
    assert set(training[0]) == {"step", "tokens", "loss", "lr", "grad_norm", "ms", "tokens_per_s"}
    assert training[-1]["tokens"] == 20 * 256
    assert [r["step"] for r in evaluations] == [0, 10, 20]
    # A random start knows nothing: ln 50257 = 10.82.
    assert abs(evaluations[0]["val_loss"] - math.log(50257)) < 0.1
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"] - 0.5
    assert evaluations[-1]["hellaswag"]["n"] == 6
    assert evaluations[-1]["hellaswag"]["is_sample"] is True
    assert [r["scores"]["bits_per_byte"]["n"] if "scores" in r else None for r in evaluations] == [6, None, 6]
    assert (
        f"scores      | bits_per_byte {evaluations[0]['scores']['bits_per_byte']['bits_per_byte']:.4f} (n=6" in console
    )
    [sample] = evaluations[-1]["samples"]
    assert sample.startswith("The")
    report = (output / "report.html").read_text(encoding="utf-8")
    for text in ("finished", f"{evaluations[-1]['val_loss']:.4f}", "bigram", "bits_per_byte", html.escape(sample[3:])):
        assert text in report

    assert "4 sequences x 32 tokens x 2 accumulated x 1 process(es) = 256 tokens per step" in console
    assert "bigram" in console
    assert "NOT HellaSwag" in console
    assert "tok/s" in console
    assert "left" in console
    assert "AutoModelForCausalLM.from_pretrained" in console
    checkpoint = str(output / "checkpoints" / "step_000020")
    for command in (
        ["python", "sample.py", checkpoint],
        ["python", "-m", "eval", "--model", checkpoint],
        ["python", "-m", "hub", "push", checkpoint],
    ):
        lines = [line for line in console.splitlines() if " ".join(command[:-1]) in line]
        assert shlex.split(lines[0])[1 : 1 + len(command)] == command


def test_provenance_says_what_made_the_run(finished_run):
    output, _ = finished_run
    made = json.loads((output / "provenance.json").read_text())
    assert made["config"]["optim"]["lr"] == 3e-3
    assert made["versions"]["torch"] == torch.__version__
    assert made["hardware"]["processes"] == 1
    assert made["model"]["parameters"] == initial_gpt2(50257).num_parameters()
    assert made["data"]["train_tokens"] > 1000


@pytest.mark.parametrize(("seq_len_warmup", "name", "vocab_size"), [(0, "tiny", 50257), (0.5, "small", 512)])
def test_losses_follow_a_plain_pytorch_loop(seq_len_warmup, name, vocab_size, finished_run, launch, request, tmp_path):
    """transformers' GPT-2, torch's AdamW and batches read with numpy alone: 20 steps within 1e-3."""
    recipe, (output, _) = request.getfixturevalue(name), finished_run
    if seq_len_warmup:
        output = tmp_path / "run"
        launch("--config", recipe, "--output_dir", output, "--batch.seq_len_warmup", seq_len_warmup)
    windows = []
    for shard in sorted((recipe.parent / "shards").glob("*_train_*.bin")):
        tokens = np.fromfile(shard, dtype="<u2", offset=1024).astype(np.int64)
        windows += [tokens[i * 32 : i * 32 + 33] for i in range((len(tokens) - 1) // 32)]
    permutations = [Permutation(len(windows), f"seed 1337, epoch {epoch}") for epoch in range(50)]
    order = np.concatenate([permutation(np.arange(len(windows))) for permutation in permutations])
    batches = []
    for step in range(20):
        batch = torch.tensor(np.stack([windows[i] for i in order[step * 8 : step * 8 + 8]]))
        length = {0: 8, 1: 16}.get(step // 5, 32) if seq_len_warmup else 32
        batches.append((batch[:, :-1].reshape(-1, length), batch[:, 1:]))
    expected = train_by_hand(initial_gpt2(vocab_size), batches)
    assert losses(output) == pytest.approx(expected, abs=1e-3)
    assert expected[-1] < expected[0] - 0.5


def test_resuming_a_finished_run_has_nothing_to_do(finished_run, launch, tiny, tmp_path):
    """Also where it was killed before it could say that it is finished."""
    output = tmp_path / "run"
    shutil.copytree(finished_run[0], output, symlinks=True)
    (output / "status.json").write_text('{"status": "running"}')
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.is_file() and p.name != "status.json"}
    done = launch("--config", tiny, "--output_dir", output, "--resume", "auto")
    assert "nothing left to do" in done.stdout
    assert before == {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.is_file() and p.name != "status.json"}
    assert json.loads((output / "status.json").read_text())["checkpoint"].endswith("step_000020")


def test_a_branch_in_a_folder_of_its_own_takes_its_past_along(finished_small, launch, small, tmp_path):
    original = finished_small
    checkpoint = original / "checkpoints" / "step_000010"
    options = ("--optim.lr", 1e-4, "--trackers", "[tensorboard]")
    launch("--config", small, "--output_dir", tmp_path / "branch", "--resume", checkpoint, *options)
    branch = losses(tmp_path / "branch")
    assert branch[:11] == losses(original)[:11]
    assert branch[12:] != losses(original)[12:]
    launches = json.loads((tmp_path / "branch" / "provenance.json").read_text())["earlier_launches"]
    assert [launch["from_step"] for launch in launches] == [0]
    assert len(branch) == 20


def test_a_resumed_run_keeps_the_launches_before_its_step(tmp_path):
    before = tmp_path / "before.json"
    before.write_text(json.dumps({"from_step": 10, "earlier_launches": [{"from_step": 0}, {"from_step": 4}]}))
    for step, launches in ((10, [0, 4, 10]), (9, [0, 4]), (0, [0])):  # not what came after the step it branches off
        assert [launch["from_step"] for launch in earlier_launches(before, step)] == launches
    before.write_text("{damaged")
    assert earlier_launches(before, 10) == earlier_launches(tmp_path / "nowhere.json", 10) == []
    # A run's checkpoints may lie on another disk.
    (tmp_path / "disk" / "step_000001").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000001"
    assert run_folder_of(checkpoint, tmp_path / "run") == tmp_path / "run"
    assert run_folder_of(checkpoint, tmp_path / "other") == tmp_path


# One of gloo's threads still has tensors of Python's when the processes part: the second process is late.
LINGERING = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch, torch.distributed, train

close = train.RunLog.close

def close_and_linger(log, *error):
    close(log, *error)
    late = torch.distributed.get_rank() == 1
    time.sleep(1 if late else 0)
    torch.distributed.all_gather([torch.zeros(1), torch.zeros(1)], torch.zeros(1), async_op=True)

train.RunLog.close = close_and_linger
sys.exit(train.main())
"""


def test_two_processes_give_the_losses_of_one_and_part(finished_small, launch, small, tmp_path):
    (tmp_path / "lingering.py").write_text(LINGERING)
    launch(
        *("--config", small, "--output_dir", tmp_path / "two", *scored_task(small)),
        accelerate=TWO_PROCESSES,
        script=tmp_path / "lingering.py",
    )
    original = finished_small
    assert json.loads((tmp_path / "two" / "provenance.json").read_text())["hardware"]["processes"] == 2
    assert losses(tmp_path / "two") == pytest.approx(losses(original), abs=2e-5)
    for a, b in zip(records(original), records(tmp_path / "two"), strict=True):
        if "val_loss" in a:
            assert a["val_loss"] == pytest.approx(b["val_loss"], abs=2e-5)
            assert a["hellaswag"] == b["hellaswag"]
            scores = [r.get("scores", {}).get("bits_per_byte") for r in (a, b)]
            assert scores[0] == pytest.approx(scores[1], abs=2e-5)
    weights, expected = (
        load_file(run / "checkpoints" / "step_000020" / "model.safetensors") for run in (tmp_path / "two", original)
    )
    for name, parameter in expected.items():
        torch.testing.assert_close(weights[name], parameter, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    states = load_file(tmp_path / "two" / "checkpoints" / "step_000020" / "training_state" / "rng.safetensors")
    assert states.keys() == {"0.cpu", "1.cpu"}


def test_dry_run_writes_nothing(launch, tiny, tmp_path):
    done = launch("--config", tiny, "--output_dir", tmp_path / "dry", "--dry_run", "--eval.tasks", "core:mini@20")
    assert "5,120 tokens" in done.stdout
    assert "task      hellaswag, limit 6, every 10 steps\ntask      core, limit 50, every 20 steps\n" in done.stdout
    assert "parameters" in done.stdout
    assert not (tmp_path / "dry").exists()


# ---------------------------------------------------------------------------------------------------------------
# A checkpoint, opened by someone who has only transformers.

NOT_INSTALLED = "import sys; sys.modules['modeling_gpt2repro'] = None  # importing it raises\n"
ELSEWHERE = """
import torch
from safetensors.torch import load_file
from transformers import AutoModel, pipeline

path = sys.argv[1]
expected = load_file(sys.argv[2])
model.eval()
trunk = AutoModel.from_pretrained(path, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model)
ids = tokenizer("The with statement", return_tensors="pt").input_ids
assert ids.tolist() == expected["ids"].tolist(), ids
with torch.no_grad():
    logits = model(ids).logits
    assert torch.equal(logits, expected["logits"]), (logits - expected["logits"]).abs().max()
    assert torch.equal(model.lm_head(trunk(ids).last_hidden_state), logits)
assert model.lm_head.weight is model.transformer.wte.weight
text = pipeline("text-generation", model=path, trust_remote_code=True)("The with", max_new_tokens=5)
assert text[0]["generated_text"].startswith("The with"), text
print("opened")
"""


def test_a_checkpoint_opens_elsewhere_without_this_project(finished_run, tmp_path):
    """By the lines that the run ends with, typed on a terminal: nothing is asked there."""
    from safetensors.torch import save_file

    output, console = finished_run
    checkpoint = tmp_path / "downloaded"
    shutil.copytree(output / "checkpoints" / "step_000020", checkpoint)
    model = GPT2ReproForCausalLM.from_pretrained(checkpoint).eval()
    ids = torch.tensor([[464, 351, 2643]])  # "The with statement"
    with torch.no_grad():
        save_file({"ids": ids, "logits": model(ids).logits}, tmp_path / "expected.safetensors")
    (tmp_path / "elsewhere").mkdir()
    last_lines = console[console.index("\nload    ") :]
    last_lines = last_lines.replace(str(output / "checkpoints" / "step_000020"), str(checkpoint))
    load = "".join(f"{line[8:]}\n" for line in last_lines.splitlines()[1:4])
    program = NOT_INSTALLED + load + ELSEWHERE
    finished = run_on_terminal(
        [sys.executable, "-c", program, str(checkpoint), str(tmp_path / "expected.safetensors")],
        cwd=tmp_path / "elsewhere",
        environment=clean_environment(tmp_path / "elsewhere"),
    )
    assert finished.returncode == 0, finished.output
    assert finished.output.strip().endswith("opened")
    assert not any(words in finished.output.lower() for words in ("custom code", "not supported", "traceback"))


def test_checkpoint_has_no_pickle_and_no_stray_file(finished_run):
    output, _ = finished_run
    checkpoint = output / "checkpoints" / "step_000020"
    names = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert {name.rsplit(".", 1)[-1] for name in names} <= {"json", "safetensors", "py", "txt"}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert {"training_state/state.json", "training_state/optimizer.safetensors"} <= names
    umask = os.umask(0o022)
    os.umask(umask)
    assert modes(checkpoint) == {oct(0o666 & ~umask)}
    config = json.loads((checkpoint / "config.json").read_text())
    heads = ("", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification")
    assert set(config["auto_map"]) == {"AutoConfig", *(f"AutoModel{head}" for head in heads)}
    for target in config["auto_map"].values():
        assert target.split(".")[0] + ".py" in names


# ---------------------------------------------------------------------------------------------------------------
# Bad input: one line, a non-zero exit, nothing half-written.


@pytest.fixture
def fails(tiny, tmp_path, monkeypatch, capsys):
    """fails(*arguments) -> the error line of train.py run in this process with the tiny recipe."""
    monkeypatch.setattr(os, "environ", clean_environment(tmp_path))
    monkeypatch.chdir(ROOT)
    output = tmp_path / "run"

    def run(*arguments):
        capsys.readouterr()
        code = train.main(["--config", str(tiny), "--output_dir", str(output), *map(str, arguments)])
        errors = capsys.readouterr().err.splitlines()
        assert code == 2, errors
        (message,) = [line for line in errors if line.startswith("error: ")]
        assert errors[-1] == message
        assert not output.exists()
        return message

    return run


def test_torn_shard(fails, tiny, tmp_path):
    shutil.copytree(tiny.parent / "shards", tmp_path / "torn")
    shard = next((tmp_path / "torn").glob("*_train_*.bin"))
    os.truncate(shard, shard.stat().st_size - 100)
    assert shard.name in fails("--data.path", tmp_path / "torn")


def test_a_tracker_that_is_not_there(fails, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "trackers: wandb is not installed: pip install wandb" in fails("--trackers", "[wandb]")


def test_weights_that_cannot_be_begun_with(fails, tmp_path):
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=4, n_head=2, n_positions=32))
    gpt2.save_pretrained(tmp_path / "gpt2")
    weights, config = tmp_path / "gpt2" / "model.safetensors", tmp_path / "gpt2" / "config.json"
    saved = json.loads(config.read_text())
    for changes, words in (
        ({"model_type": "bert"}, "is a 'bert' model"),
        ({"n_layer": 2}, "asks for 12 tensors that the weights lack"),
        ({"n_layer": 2, "n_embd": 8}, "the weights lack or have in another shape"),
        ({"activation_function": "relu"}, "activation_function"),
        ({"activation_function": "relu", "vocab_size": 99}, "has a vocabulary of 99"),
    ):
        config.write_text(json.dumps(saved | changes))
        assert words in fails("--init_from", tmp_path / "gpt2")
    config.write_text(json.dumps(saved))
    os.truncate(weights, weights.stat().st_size // 2)
    assert "model.safetensors is damaged or incomplete" in fails("--init_from", tmp_path / "gpt2")


def test_a_run_that_is_there_is_not_overwritten(finished_run, tiny, capsys):
    output, _ = finished_run
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*")}
    assert train.main(["--config", str(tiny), "--output_dir", str(output)]) == 2
    assert "--resume auto" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in output.rglob("*")}


def test_resuming_another_run_is_refused(finished_run, fails):
    output, _ = finished_run
    checkpoint = output / "checkpoints" / "step_000010"
    message = fails("--resume", checkpoint, "--seed", "7")
    assert "seed=1337" in message
    assert "7" in message
    message = fails("--resume", checkpoint, "--data.order", "sequential")
    assert "data.order=shuffled, this run has sequential" in message
    assert f"--init_from {checkpoint}" in message


def test_order_and_boundary(launch, small, finished_small, tmp_path):
    """Shards as they lie, documents kept apart."""
    options = ("--config", small, "--data.order", "sequential", "--data.boundary", "document", "--max_steps", 3)
    launch(*options, "--output_dir", tmp_path / "run")
    assert losses(tmp_path / "run")[0] == pytest.approx(losses(finished_small)[0], abs=0.3)
    assert losses(tmp_path / "run")[0] != losses(finished_small)[0]


def test_sample_is_prepared_once_and_an_interrupted_one_is_finished(tmp_path):
    """Two first runs at once make one sample. After a killed preparation, the next one makes the same files."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    code = f"from data.prepare import prepare_sample_if_missing; prepare_sample_if_missing({str(whole)!r})"
    runs = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sorted("preparing the offline sample" in output for output in outputs) == [False, True]
    assert not needs_preparing(whole)

    again.mkdir()
    assert not needs_preparing(again)
    plan = read_manifest(whole)
    plan.shards = []
    plan.write(again / "preparing.json")
    (again / ".sample_train_00000000.bin.partial").write_bytes(b"half of it")
    assert needs_preparing(again)
    prepare_sample(again)
    assert not needs_preparing(again)
    one, two = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (whole, again))
    assert one == two


def test_the_launched_command_fails_with_one_line(launch, tiny, tmp_path):
    done = launch(
        *("--config", tiny, "--output_dir", tmp_path / "run", "--data.path", tmp_path / "nowhere"),
        accelerate=["--quiet"],
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_text_is_prepared_once_by_one_of_two_processes(launch, tiny, tmp_path):
    """In one command; the second run finds the shards, a changed text is not the run's, and a bad one ends both."""
    text, recipe = tmp_path / "book.jsonl", tmp_path / "tiny.yaml"
    shutil.copy(tiny.parent / "tiny.jsonl", text)
    recipe.write_text(RECIPE)
    command = ("--config", recipe, "--text", text, "--output_dir", tmp_path / "run", "--resume", "auto")
    two = ["--quiet", *TWO_PROCESSES]
    cache = "shards/book-*"
    before = set(ROOT.glob(cache))
    try:
        first = launch(*command, "--max_steps", 10, accelerate=two).stdout
        assert first.count("preparing") == 1
        assert len(set(ROOT.glob(cache)) - before) == 1
        again = launch(*command, "--max_steps", 10, accelerate=two).stdout
        assert "preparing" not in again and "nothing left to do" in again
        text.write_text(text.read_text() + json.dumps("Another document. " * 20))
        changed = launch(*command, accelerate=two, check=False)
        assert "preparing" in changed.stdout and changed.returncode != 0 and "train_" in changed.stderr
        text.write_text("{")
        bad = launch(*command, accelerate=two, check=False)
        assert bad.returncode != 0 and "book.jsonl:1: not JSON" in bad.stderr
    finally:
        for path in {*ROOT.glob(cache), *ROOT.glob("shards/.book-*")} - before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
