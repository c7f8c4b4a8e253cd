"""`python -m eval` as a user meets it."""

import copy
import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from eval import __main__ as command
from eval.hellaswag.accuracy import accuracy
from eval.hellaswag.items import SAMPLE, load_items
from eval.hellaswag.task import score_hellaswag

GOOD = SAMPLE.read_text(encoding="utf-8").splitlines()[0]


@pytest.fixture
def fails(capsys, monkeypatch):
    """Runs the command, which must fail with one line before any model is loaded; gives the line."""

    def run(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(command, "_load_model", lambda *_: pytest.fail("came as far as loading the model"))
            assert command.main([str(argument) for argument in arguments]) == 2
        return _error_line(capsys.readouterr())

    return run


def _error_line(output):
    stdout, stderr = (output.out, output.err) if hasattr(output, "out") else (output.stdout, output.stderr)
    assert stdout == ""
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1, stderr
    return stderr.strip()


# ------------------------------------------------------------------------------------- what it gives


def test_own_checkpoint_with_a_file_of_items(run_python, own_checkpoint, tiny_gpt2, tokenizer, tmp_path):
    """Its modeling code comes with the folder: no flag is needed, and nothing of this checkout either."""
    data = tmp_path / "items.jsonl"
    data.write_text("\n".join(SAMPLE.read_text(encoding="utf-8").splitlines()[:12]), encoding="utf-8")
    output = tmp_path / "result.json"
    run = run_python(
        *("-m", "eval", "--model", own_checkpoint, "--data", data, "--limit", 10, "--batch_size", 7),
        *("--tasks", "hellaswag", "--device", "cpu", "--output", output),
    )
    assert (run.returncode, run.stderr) == (0, "")

    items, source = load_items(data, 10)
    expected = accuracy(score_hellaswag(tiny_gpt2, tokenizer, items), [item.label for item in items])
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["results"] == pytest.approx(expected)
    assert result["task"] == "hellaswag"
    assert result["model"] == str(own_checkpoint)
    assert result["published"] is None
    assert result["data"] == {
        "source": f"{data}, the first 10 of 12 items",
        "is_sample": False,
        "sha256": source.sha256,
    }
    assert (result["dtype"], result["device"], result["batch_size"]) == ("float32", "cpu", 7)
    assert result["versions"]["torch"] == torch.__version__
    assert result["seconds"] > 0
    assert result["sequences_cut_to_context"] == 0

    assert [line.split()[0] for line in run.stdout.splitlines() if line] == [
        *("task", "hellaswag", "model", "items", "time"),
    ]
    for name in ("acc", "acc_norm"):
        assert f"{expected[name]:.4f} ± {expected[name + '_stderr']:.4f}" in run.stdout
    assert f"{data}, the first 10 of 12 items" in run.stdout
    assert "OpenAI" not in run.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf_home", "items.jsonl", "result.json"]


def test_without_network_the_sample_is_scored_and_called_that(run_python, checkpoint, tmp_path):
    output = tmp_path / "result.json"
    run = run_python("-m", "eval", "--model", checkpoint, "--dtype", "bfloat16", "--limit", 4, "--output", output)
    assert run.returncode == 0
    sentence = "SAMPLE of 4 items written for this project, NOT HellaSwag: not comparable with published numbers"
    assert run.stderr.startswith(f"warning: {sentence} (Rowan/hellaswag was not to be had: ")
    assert run.stderr.count("\n") == 1
    assert sentence in run.stdout
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["data"]["source"].startswith(sentence)
    assert result["data"]["is_sample"]
    assert (result["results"]["n"], result["dtype"]) == (4, "bfloat16")


@pytest.fixture
def in_process(monkeypatch, evaluate_cache, checkpoint, tiny_gpt2, tokenizer, capsys):
    """The command in this process, with the model that is here already."""
    monkeypatch.setattr(command, "_load_model", lambda args: (tokenizer, tiny_gpt2))

    def run(*arguments):
        code = command.main([str(argument) for argument in ("--model", checkpoint, "--device", "cpu", *arguments)])
        return code, capsys.readouterr()

    return run


def test_published_numbers_stand_beside_the_full_set_only(in_process, monkeypatch, tmp_path):
    data = tmp_path / "items.jsonl"
    data.write_text(f"{GOOD}\n{GOOD}\n{GOOD}\n", encoding="utf-8")
    monkeypatch.setattr(command, "NUM_VALIDATION_ITEMS", 3)
    output = tmp_path / "result.json"
    _, printed = in_process("--data", data, "--output", output)
    [line] = [line for line in printed.out.splitlines() if line.startswith("OpenAI GPT-2 124M")]
    assert line.split()[-2:] == ["0.2859", "0.2955"]
    assert json.loads(output.read_text())["published"]["acc_norm"] == 0.2955
    for arguments in (("--data", data, "--limit", 2), ("--data", "sample", "--limit", 3)):
        _, printed = in_process(*arguments)
        assert "OpenAI" not in printed.out


def test_one_item_has_no_standard_error(in_process, tmp_path):
    output = tmp_path / "result.json"
    code, _ = in_process("--data", "sample", "--limit", 1, "--output", output)
    assert code == 0
    assert json.loads(output.read_text())["results"]["acc_stderr"] is None  # nan would be no JSON


def test_cut_contexts_are_told(in_process, tmp_path):
    item = json.loads(GOOD)
    data = tmp_path / "items.jsonl"
    data.write_text(json.dumps(item | {"ctx": "word " * 200}) + "\n" + GOOD, encoding="utf-8")
    output = tmp_path / "result.json"
    _, printed = in_process("--data", data, "--output", output)
    assert "4 of 8 sequences were longer than the model's context and lost their beginning" in printed.out
    assert json.loads(output.read_text())["sequences_cut_to_context"] == 4


def test_a_full_disk_leaves_what_was_there(in_process, monkeypatch, tmp_path):
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


# -------------------------------------------------------------------------------- what it refuses early


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "helaswag"], "--tasks 'helaswag': no such task; did you mean 'hellaswag'?"),
        (["--tasks", "hellaswag", "zzz"], "--tasks 'zzz': no such task; there are: hellaswag"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--limit", "-3"], "--limit must be at least 1, got -3"),
        (["--limit", "many"], "argument --limit: invalid int value: 'many'"),
        (["--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        (["--dtype", "float8"], "argument --dtype: invalid choice: 'float8'"),
        (["--device", "abacus"], "--device 'abacus' is not to be had"),
        (["--lim", "5"], "unrecognized arguments: --lim 5"),
        (["--data", "nowhere.jsonl"], "items 'nowhere.jsonl': no such file; give"),
        (["--output", "no/such/folder/result.json"], "there is no folder 'no/such/folder'"),
        (["--output", "."], "--output '.' is a folder; name a file in it"),
    ],
)
def test_bad_arguments(fails, checkpoint, arguments, message):
    assert message in fails("--model", checkpoint, *arguments)


def test_no_model(fails):
    assert "the following arguments are required: --model" in fails()


@pytest.mark.parametrize("name", ["./nowhere", "runs/my/run", "/no/such/folder", "a b"])
def test_a_model_that_cannot_be(fails, name):
    assert f"--model {name!r}: no such folder, nor a Hub id" in fails("--model", name)


def test_a_run_folder_instead_of_its_checkpoint(fails, own_checkpoint):
    line = fails("--model", own_checkpoint.parents[1])
    assert "has no config.json" in line
    assert f"did you mean {str(own_checkpoint)!r}?" in line
    assert "is a file; give the folder" in fails("--model", own_checkpoint / "config.json")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[]", "[] is no JSON object"),
        (GOOD.replace('"label": ', '"label": 1'), "label must be 0, 1, 2 or 3"),
        (GOOD.replace('"endings": ["', '"endings": ["", "'), "exactly 4 texts, got 5 of them"),
        ('{"ctx": "a", "endings": ["a", "b", "", "d"], "label": 1}', "ending 2 is empty"),
    ],
)
def test_malformed_items(fails, checkpoint, tmp_path, line, message):
    data, output = tmp_path / "items.jsonl", tmp_path / "result.json"
    data.write_text(f"{GOOD}\n{line}\n{GOOD}\n", encoding="utf-8")
    error = fails("--model", checkpoint, "--data", data, "--limit", 1, "--output", output)
    assert error.startswith(f"error: {data}:2: ")
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["items.jsonl"]


# ---------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize(("arguments", "dtype"), [([], torch.float32), (["--dtype", "bfloat16"], torch.bfloat16)])
def test_dtype_is_the_one_asked_for_whatever_was_saved(tiny_gpt2, tokenizer, tmp_path, arguments, dtype):
    copy.deepcopy(tiny_gpt2).to(torch.float16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    args = command._parse_arguments(["--model", str(tmp_path), *arguments])
    args.device = "cpu"
    _, model = command._load_model(args)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def _edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BREAKAGES = {
    "no tokenizer": (
        lambda f: [p.unlink() for p in f.glob("tokenizer*")],
        "has no tokenizer; put one there with",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no file named model.safetensors"),
    "pickled weights": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "no file named model.safetensors",
    ),
    "weights cut short": (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 100), "cannot be opened"),
    "fewer weights": (
        lambda f: _edit_config(f, n_layer=3),
        "12 tensors that the weights lack or have in another",
    ),
    "other shapes": (lambda f: _edit_config(f, n_positions=64), "(transformer.wpe.weight, ...)"),
    "unknown kind": (lambda f: _edit_config(f, model_type="gpt7"), "model type `gpt7`"),
    "no kind": (lambda f: (f / "config.json").write_text("{}"), "Should have a `model_type` key"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "cannot be opened (TypeError: "),
    "tokenizer broken": (
        lambda f: (f / "tokenizer.json").write_text("{"),
        "cannot be opened (JSONDecodeError: ",
    ),
}


@pytest.mark.parametrize("kind", BREAKAGES)
def test_broken_checkpoints(checkpoint, tmp_path, kind):
    breakage, message = BREAKAGES[kind]
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    breakage(folder)
    args = command._parse_arguments(["--model", str(folder), "--device", "cpu"])
    with pytest.raises(command.EvalError) as raised:
        command._load_model(args)
    assert f"--model {str(folder)!r}" in str(raised.value)
    assert message in str(raised.value)


def test_a_hub_model_without_network(run_python, tmp_path):
    output = tmp_path / "result.json"
    start = time.perf_counter()
    run = run_python("-m", "eval", "--model", "me/nowhere", "--data", "sample", "--output", output)
    assert time.perf_counter() - start < 30  # transformers alone would retry for 46 seconds
    assert run.returncode == 2
    reason = "no such folder, nor in the Hub's local cache, and http://127.0.0.1:9 cannot be reached"
    assert f"--model 'me/nowhere': {reason}" in _error_line(run)
    assert not output.exists()


def test_code_from_the_hub_runs_only_when_asked_for(run_python, local_hub, own_checkpoint, tmp_path):
    files = {path.name: path.read_bytes() for path in own_checkpoint.iterdir() if path.is_file()}
    address = local_hub({"models/me/repro": files})
    output = tmp_path / "result.json"
    arguments = ("-m", "eval", "--model", "me/repro", "--data", "sample", "--limit", 2, "--output", output)

    run = run_python(*arguments, HF_ENDPOINT=address)
    assert run.returncode == 2
    assert "brings its own modeling code; read it, then run it with --trust_remote_code" in _error_line(run)

    run = run_python(*arguments, "--trust_remote_code", HF_ENDPOINT=address)
    assert run.returncode == 0, run.stderr
    assert json.loads(output.read_text())["revision"] == "c" * 40

    # Once in the cache, no network is needed.
    online = output.read_text()
    run = run_python(*arguments, "--trust_remote_code")
    assert run.returncode == 0, run.stderr
    assert json.loads(output.read_text())["results"] == json.loads(online)["results"]


def test_a_bug_shows_its_traceback(in_process, monkeypatch):
    monkeypatch.setattr(command, "score_hellaswag", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        in_process("--data", "sample")


def test_help_says_when_code_is_run(run_python):
    run = run_python("-m", "eval", "--help")
    assert run.returncode == 0
    text = " ".join(run.stdout.split())
    assert "Modeling code in the folder is run" in text
    assert "modeling code from the Hub only with --trust_remote_code" in text
