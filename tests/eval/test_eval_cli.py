"""Test the command `python -m eval`."""

import json
import math
import os
import time
from pathlib import Path

import pytest
import torch
from tiny_run import TWO_PROCESSES

from common.weights import weights_sha256
from eval import __main__ as program
from eval import command, evaluate
from eval.hellaswag import task as hellaswag_task
from eval.hellaswag.task import SAMPLE
from eval.hellaswag.task import Task as HellaSwag
from eval.items import HubUnavailableError

GOOD = SAMPLE.read_text(encoding="utf-8").splitlines()[0]


@pytest.fixture
def fails(capsys, monkeypatch):
    """Return a function that runs the command, which must fail before a model is loaded, and returns the error line."""

    def run(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(command, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
            assert program.main([str(argument) for argument in arguments]) == 2
        return _error_line(capsys.readouterr())

    return run


def _error_line(output):
    stdout, stderr = (output.out, output.err) if hasattr(output, "out") else (output.stdout, output.stderr)
    assert stdout == ""
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1, stderr
    return stderr.strip()


# ------------------------------------------------------------------------------------------- results


def test_own_checkpoint_is_scored_on_a_file_of_items(run_python, own_checkpoint, tiny_gpt2, tokenizer, tmp_path):
    """The modeling code in the folder is used, without a flag."""
    data = tmp_path / "items.jsonl"
    data.write_text("\n".join(SAMPLE.read_text(encoding="utf-8").splitlines()[:12]), encoding="utf-8")
    output = tmp_path / "result.json"
    run = run_python(
        *("-m", "eval", "--model", own_checkpoint, "--data", data, "--limit", 10, "--tokens_per_batch", 200),
        *("--tasks", "hellaswag", "--device", "cpu", "--output", output),
    )
    assert (run.returncode, run.stderr) == (0, "")
    task = HellaSwag(data=str(data), limit=10)
    expected = evaluate(tiny_gpt2, tokenizer, [task])
    metrics = expected["results"]["hellaswag"]
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["results"] == {"hellaswag": pytest.approx(metrics)}
    assert result["published"] == {}
    [(name, description)] = result["tasks"].items()
    assert (name, description["version"], description["figures"]) == ("hellaswag", task.version, task.metrics)
    assert description["data"] == expected["tasks"]["hellaswag"]["data"]
    assert description["seconds"] > 0
    assert result["model"] == {
        **{"name": str(own_checkpoint), "revision": None, "class": "GPT2ReproForCausalLM", "dtype": "float32"},
        "weights_sha256": weights_sha256(own_checkpoint),
        **{"device": "cpu", "n_layer": 2, "n_embd": 32, "parameters": tiny_gpt2.num_parameters()},
    }
    assert result["versions"]["torch"] == torch.__version__
    assert result["processes"] == 1
    assert result["date"].endswith("+00:00")

    assert [line.split()[0] for line in run.stdout.splitlines() if line] == [
        *("task", *["hellaswag"] * 4, "model", "items", "time"),
    ]
    for name in task.metrics:
        [line] = [line for line in run.stdout.splitlines() if line.split()[1:2] == [name]]
        assert f"{metrics[name]:.4f} ± {metrics[name + '_stderr']:.4f}" in line
        assert line.endswith(task.metrics[name])
    assert f"{data}, the first 10 of 12 items" in run.stdout
    assert "OpenAI" not in run.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf_home", "items.jsonl", "result.json"]


@pytest.fixture
def in_process(monkeypatch, checkpoint, tiny_gpt2, capsys):
    """Return a function that runs the command in this process with the tiny model."""
    monkeypatch.setattr(command, "load_model", lambda *_, **__: tiny_gpt2)

    def run(*arguments):
        code = program.main([str(argument) for argument in ("--model", checkpoint, "--device", "cpu", *arguments)])
        return code, capsys.readouterr()

    return run


def test_sample_is_scored_with_a_warning_without_a_network(in_process, monkeypatch, tmp_path):
    def fail(*_):
        raise HubUnavailableError("the network is down")

    monkeypatch.setattr(hellaswag_task, "hub_records", fail)
    output = tmp_path / "result.json"
    code, printed = in_process("--dtype", "bfloat16", "--limit", 4, "--output", output)
    sentence = "SAMPLE of 4 items written for this project, NOT HellaSwag: not comparable with published numbers"
    assert code == 0
    assert printed.err.startswith(f"warning: {sentence} (Rowan/hellaswag is not available: the network is down; ")
    assert printed.err.count("\n") == 1
    assert sentence in printed.out
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["tasks"]["hellaswag"]["data"]["source"].startswith(sentence)
    assert result["tasks"]["hellaswag"]["data"]["is_sample"]
    assert result["results"]["hellaswag"]["n"] == 4


def test_published_results_are_shown_for_the_full_set_only(in_process, monkeypatch, tmp_path):
    data = tmp_path / "items.jsonl"
    data.write_text(f"{GOOD}\n{GOOD}\n{GOOD}\n", encoding="utf-8")
    monkeypatch.setattr(HellaSwag, "full_size", 3)
    output = tmp_path / "result.json"
    _, printed = in_process("--data", data, "--output", output)
    header, *lines = printed.out.splitlines()[:5]
    assert header.split("  ")[-1].strip() == "OpenAI GPT-2 124M"
    for line, value in zip(lines, ("0.2859", "0.2955", "0.2892", "0.3114"), strict=True):
        assert f"  {value}  " in line
    published = json.loads(output.read_text())["published"]
    assert published["OpenAI GPT-2 124M"]["hellaswag"]["acc_norm"] == 0.2955
    for arguments in (("--data", data, "--limit", 2), ("--data", "sample", "--limit", 3)):
        _, printed = in_process(*arguments)
        assert "OpenAI" not in printed.out


def test_truncated_items_are_reported(in_process, tmp_path):
    item, words = json.loads(GOOD), "word " * 200  # too long for one prompt, for the other, for neither
    items, output = [item | {"ctx": words}, item | {"ctx_a": words}, item], tmp_path / "result.json"
    data = tmp_path / "items.jsonl"
    data.write_text("\n".join(map(json.dumps, items)))
    _, printed = in_process("--data", data, "--output", output)
    assert "hellaswag: 2 of 3 items did not fit the model's context and lost their beginning" in printed.out
    assert json.loads(output.read_text())["results"]["hellaswag"]["num_truncated"] == 2


def test_per_item_file_has_the_results_of_all_tasks(in_process, tmp_path):
    lambada, text = tmp_path / "lambada.jsonl", tmp_path / "text.txt"
    lambada.write_text('{"text": "He said it"}\n{"context": "One", "continuation": "two"}\n')
    text.write_text("Some text.")
    arguments = (
        *("--tasks", "bits_per_byte", "lambada", "hellaswag", "--stride", 3, "--limit", 2),
        *("--data", f"lambada={lambada}", f"bits_per_byte={text}", "hellaswag=sample"),
    )
    code, printed = in_process(*arguments, "--per_item", tmp_path / "items.jsonl")
    assert code == 0
    rows = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert [(row["task"], row["item"]) for row in rows] == [
        ("bits_per_byte", 0),
        *(("lambada", 0), ("lambada", 1), ("hellaswag", 0), ("hellaswag", 1)),
    ]
    assert rows[1]["word"] == "it"
    assert len(rows[3]["lecture_log_likelihoods"]) == 4
    perplexity = math.exp(-(rows[1]["log_likelihood"] + rows[2]["log_likelihood"]) / 2)
    assert f"{perplexity:.4f} ± " in printed.out
    assert "text.txt, stride 3, the first 1 documents" in printed.out


def test_two_processes_give_the_results_of_one(in_process, own_checkpoint, run_python, tmp_path):
    """Score eleven items, an uneven number."""
    output = tmp_path / "two.json"
    run = run_python(
        *("-m", "accelerate.commands.launch", *TWO_PROCESSES),
        *("-m", "eval", "--model", own_checkpoint, "--data", "sample", "--limit", 11),
        *("--output", output, "--per_item", tmp_path / "two.jsonl"),
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("lm_eval_acc_norm") == 1
    in_process(
        "--data", "sample", "--limit", 11, "--output", tmp_path / "one.json", "--per_item", tmp_path / "one.jsonl"
    )
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["results"]["hellaswag"] == pytest.approx(one["results"]["hellaswag"])
    one, two = ((tmp_path / name).read_text().splitlines() for name in ("one.jsonl", "two.jsonl"))
    for a, b in zip(map(json.loads, one), map(json.loads, two), strict=True):
        assert a["item"] == b["item"]
        assert a["lm_eval_log_likelihoods"] == pytest.approx(b["lm_eval_log_likelihoods"], abs=1e-3)


def test_full_disk_keeps_the_older_file(in_process, monkeypatch, tmp_path):
    output = tmp_path / "result.json"
    output.write_text("older", encoding="utf-8")

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    code, printed = in_process("--data", "sample", "--limit", 1, "--output", output)
    assert code == 2
    assert "cannot be written" in printed.err and "No space left" in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert output.read_text(encoding="utf-8") == "older"


# -------------------------------------------------------------------------------------- invalid arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "hellaswag", "zzz"], "choose from bits_per_byte, blimp, core, hellaswag, lambada, "),
        (["--tasks", "lambada", "lambada"], "--tasks 'lambada' is listed twice"),
        (["--tasks", "lambada", "hellaswag", "--data", "x.jsonl"], "--data 'x.jsonl' must be TASK=PATH"),
        (["--tasks", "lambada", "--data", "helaswag=x.jsonl"], "--data 'helaswag=x.jsonl' must be TASK=PATH"),
        (["--tasks", "lambada", "--data", "lambada=nowhere.jsonl"], "items 'nowhere.jsonl': no such file; give 'hub'"),
        (["--data", "hellaswag=a", "hellaswag=b"], "--data hellaswag=b: hellaswag already has 'a'"),
        (["--tasks", "lm-eval:piqa", "--data", "lm-eval:piqa=x"], "lm-eval finds its own data"),
        (["--tasks", "lm-eval:piqa", "--per_item", "x.jsonl"], "--per_item: not available for lm-eval's tasks"),
        (["--tasks", "bits_per_byte"], "bits_per_byte needs a text"),
        (["--tasks", "bits_per_byte", "--data", "nowhere"], "nowhere: no such file or folder"),
        (["--tasks", "bits_per_byte", "--data", "README.md", "--stride", "500"], "stride must be between 1 and"),
        (["--stride", "5"], "--stride 5: it is for bits_per_byte, which is not among --tasks"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--tokens_per_batch", "0"], "--tokens_per_batch must be at least 1, got 0"),
        (["--lim", "5"], "unrecognized arguments: --lim 5"),
        (["--device", "abacus"], "device 'abacus' is not available"),
        (["--per_item", "items.parquet"], "--per_item 'items.parquet' must end in .jsonl"),
        (["--output", "no/such/folder/result.json"], "the folder 'no/such/folder' is not writable"),
        (["--output", "."], "--output '.' is a folder; name a file in it"),
        (["--output", "a" * 300], "cannot be written (File name too long)"),
    ],
)
def test_invalid_arguments_are_named(fails, checkpoint, arguments, message):
    assert message in fails("--model", checkpoint, *arguments)


def test_malformed_item_is_named_and_nothing_written(fails, checkpoint, tmp_path):
    data, output = tmp_path / "items.jsonl", tmp_path / "result.json"
    data.write_text(f"{GOOD}\n{{}}\n", encoding="utf-8")
    error = fails("--model", checkpoint, "--data", data, "--limit", 1, "--output", output)
    assert error.startswith(f"error: {data}:2: the field 'activity_label' is missing")
    assert [path.name for path in tmp_path.iterdir()] == ["items.jsonl"]


# ---------------------------------------------------------------------------------------------- models


def test_hub_model_without_a_network_fails_quickly(run_python, tmp_path):
    output = tmp_path / "result.json"
    start = time.perf_counter()
    run = run_python("-m", "eval", "--model", "me/nowhere", "--data", "sample", "--output", output)
    assert time.perf_counter() - start < 30  # transformers alone would retry for 46 seconds
    assert run.returncode == 2
    reason = "no such folder, nor in the Hub's local cache, and http://127.0.0.1:9 cannot be reached"
    assert f"checkpoint 'me/nowhere': {reason}" in _error_line(run)
    assert not output.exists()


def test_code_from_the_hub_runs_only_with_trust_remote_code(run_python, local_hub, own_checkpoint, tmp_path):
    files = {path.name: path.read_bytes() for path in own_checkpoint.iterdir() if path.is_file()}
    address = local_hub({"models/me/repro": files})
    output = tmp_path / "result.json"
    arguments = ("-m", "eval", "--model", "me/repro", "--data", "sample", "--limit", 2, "--output", output)

    run = run_python(*arguments, HF_ENDPOINT=address)
    assert run.returncode == 2
    assert "brings its own modeling code; read it, then run it with --trust_remote_code" in _error_line(run)

    run = run_python(*arguments, "--trust_remote_code", HF_ENDPOINT=address)
    assert run.returncode == 0, run.stderr
    assert json.loads(output.read_text())["model"]["revision"] == "c" * 40

    # Once in the cache, no network is needed.
    online = output.read_text()
    run = run_python(*arguments, "--trust_remote_code")
    assert run.returncode == 0, run.stderr
    assert json.loads(output.read_text())["results"] == json.loads(online)["results"]


def test_output_follows_links_and_refuses_pipes(in_process, tmp_path):
    (tmp_path / "real.json").write_text("older")
    (tmp_path / "link.json").symlink_to("real.json")
    assert in_process("--data", "sample", "--limit", 1, "--output", tmp_path / "link.json")[0] == 0
    assert (tmp_path / "link.json").is_symlink()
    results = json.loads((tmp_path / "real.json").read_text())["results"]["hellaswag"]
    assert (results["n"], results["acc_stderr"]) == (1, None)  # JSON has no nan
    os.mkfifo(tmp_path / "pipe")
    code, printed = in_process("--data", "sample", "--output", tmp_path / "pipe")
    assert code == 2 and "is not a regular file" in printed.err
    assert (tmp_path / "pipe").is_fifo()


def test_interrupt_writes_nothing(in_process, monkeypatch, tmp_path):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "evaluate", stop)
    code, printed = in_process("--data", "sample", "--output", tmp_path / "result.json")
    assert (code, printed.err.splitlines()[-1]) == (130, "interrupted; nothing was written")
    assert not list(tmp_path.iterdir())


def test_bug_keeps_its_traceback(in_process, monkeypatch):
    monkeypatch.setattr(command, "evaluate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        in_process("--data", "sample")


def test_help_states_when_modeling_code_runs(capsys):
    with pytest.raises(SystemExit):
        program.main(["--help"])
    assert "modeling code from the Hub only with --trust_remote_code" in " ".join(capsys.readouterr().out.split())
