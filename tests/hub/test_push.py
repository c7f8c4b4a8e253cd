"""Checkpoints on the Hub: what arrives, what others get back, and what goes wrong on the way."""

import json
import logging
import re
import shutil
import traceback

import pytest
import torch
from hub_server import READ_TOKEN, TOKEN
from huggingface_hub import ModelCard, constants

from hub import HubError, push
from hub.__main__ import main
from hub.push import Repository, prepare_upload

CODE = {"configuration_gpt2repro.py", "modeling_gpt2repro.py", "loss.py", "mlp.py", "conversion.py"}
FILES = CODE | {
    *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("LICENSE", "README.md", "curves.png"),
}

PULL = """
import sys
for name in ("modeling_gpt2repro", "accelerate", "datasets", "tiktoken"):
    sys.modules[name] = None  # as if it were not installed
import json
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
logits = {}
for name in %r:
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules")
    ids = AutoTokenizer.from_pretrained(name)("Hello, I'm a language model,", return_tensors="pt").input_ids
    torch.save(model(ids).logits.detach(), %r + name.replace("/", "-"))
"""


def upload_of(checkpoint):
    return prepare_upload(checkpoint, "me/model")


@pytest.fixture
def copied(whole_run, tmp_path):
    """A checkpoint that a test may change, in a run of its own."""
    shutil.copytree(whole_run, tmp_path / "runs" / "copy")
    return tmp_path / "runs" / "copy" / "checkpoints" / "step_000020"


@torch.no_grad()
def test_what_is_pushed_opens_elsewhere(server, checkpoint, model, tokenizer, python, tmp_path, capsys):
    """By the command, and by transformers' own methods alone; both in other processes, which get the same logits."""
    assert main(["push", str(checkpoint), "me/model"]) == 0
    assert "pushed" in (said := capsys.readouterr().out) and "me/model (private)" in said
    files = server.repos["models/me/model"]
    assert files.keys() == FILES  # no training_state
    assert files["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    assert server.private == {"models/me/model"}
    assert [title for _, title in server.commits["models/me/model"]] == ["Step 20"]

    program = f"""
import modeling_gpt2repro
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoModelForCausalLM.from_pretrained({str(checkpoint)!r}).push_to_hub("me/alone", private=True)
AutoTokenizer.from_pretrained({str(checkpoint)!r}).push_to_hub("me/alone")
"""
    python(program, server, HF_TOKEN=TOKEN)
    assert server.repos["models/me/alone"].keys() >= FILES - {"LICENSE", "curves.png"}

    names = ["me/model", "me/alone"]
    python(PULL % (names, f"{tmp_path}/logits-"), server, HF_TOKEN=TOKEN, HF_MODULES_CACHE=str(tmp_path / "modules"))
    expected = model(tokenizer("Hello, I'm a language model,", return_tensors="pt").input_ids).logits
    for name in ("me-model", "me-alone"):
        assert torch.equal(torch.load(tmp_path / f"logits-{name}"), expected)


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [("PUT", "drop"), ("PUT", 500), ("/commit/", "drop"), ("/commit/", "lost"), ("/commit/", 503), ("repo", 429)],
    ids=str,
)
def test_faults_are_overcome(server, checkpoint, pattern, fault):
    server.faults = [(pattern, fault)]
    Repository("me/model").push(upload_of(checkpoint))
    assert server.faults == []
    assert server.repos["models/me/model"].keys() == FILES
    assert len(server.commits["models/me/model"]) == 1  # also where the answer was lost


def test_nothing_is_there_until_all_is(server, checkpoint):
    repository = Repository("me/model")
    server.faults = [("/commit/", "drop")] * 20
    with pytest.raises(HubError, match="after 5 attempts"):
        repository.push(upload_of(checkpoint))
    assert server.repos["models/me/model"] == {}
    server.faults = []
    sent = server.log.copy()
    repository.push(upload_of(checkpoint))
    assert not [path for method, path in server.log[len(sent) :] if method == "PUT"]  # uploaded already
    assert server.repos["models/me/model"].keys() == FILES


def test_somebody_else_pushed_meanwhile(server, checkpoint):
    server.faults = [("/commit/", "overtaken")]
    with pytest.raises(HubError, match=r"me/model has changed since this push began \(HTTP 412.*push again"):
        Repository("me/model").push(upload_of(checkpoint))
    assert server.repos["models/me/model"].keys() == {"theirs.txt"}


def test_a_repository_that_exists(server, copied):
    """A second push is one more commit, on whose weights nothing stale lies; a public one is not taken for private."""
    files = {"model.safetensors": b"old", "model-00001-of-00002.safetensors": b"old", "notes.md": b"kept"}
    server.repos["models/me/model"] = dict(files)
    with pytest.raises(HubError, match="me/model exists and everybody can see it: say --public"):
        Repository("me/model")
    repository = Repository("me/model", private=False)
    assert not repository.is_private
    repository.push(upload_of(copied))
    assert server.repos["models/me/model"].keys() == FILES | {"notes.md"}
    assert server.repos["models/me/model"]["model.safetensors"] == (copied / "model.safetensors").read_bytes()
    repository.push(upload_of(copied))
    assert len(server.commits["models/me/model"]) == 1  # nothing new, no commit
    (copied / "README.md").write_text("# My own words\n")
    repository.push(upload_of(copied))
    assert server.repos["models/me/model"]["README.md"] == b"# My own words\n"
    assert len(server.commits["models/me/model"]) == 2


@pytest.mark.parametrize(
    ("name", "token", "says"),
    [
        ("me/model", "", "run `hf auth login`, or set HF_TOKEN"),
        ("me/model", "hf_wrongwrongwrong", "does not accept this machine's token"),
        ("me/model", READ_TOKEN, "the token 'mine' of me may only read"),
        ("you/model", TOKEN, "may not write to you/model .HTTP 403"),
        ("model", TOKEN, "'model' does not say whose it is"),
        ("me/mo del", TOKEN, "'me/mo del' is no name of a repository"),
    ],
)
def test_one_clear_line(server, checkpoint, monkeypatch, capsys, name, token, says):
    monkeypatch.setenv("HF_TOKEN", token)
    assert main(["push", str(checkpoint), name]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(says, error)
    assert not server.repos
    assert not token or token not in error


def test_without_network(server, checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(push, "_ATTEMPTS", 2)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["push", str(checkpoint), "me/model"]) == 2
    assert "could not be pushed to http://127.0.0.1:9 after 2 attempts" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["push", str(checkpoint), "me/model"]) == 2
    assert "HF_HUB_OFFLINE is set: unset it" in capsys.readouterr().err


def test_the_token_is_nowhere(server, checkpoint, capsys, caplog):
    caplog.set_level(logging.DEBUG)
    Repository("me/model").push(upload_of(checkpoint))
    server.faults = [("/commit/", 400)]
    (repository := Repository("me/other"))
    try:
        repository.push(upload_of(checkpoint))
    except HubError as error:
        told = "".join(traceback.format_exception(error)) + repr(vars(error))
    captured = capsys.readouterr()
    assert "HTTP 400" in told
    for text in (told, captured.out, captured.err, caplog.text, repr(server.log)):
        assert TOKEN not in text
    for content in server.repos["models/me/model"].values():
        assert TOKEN.encode() not in content


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "has no tokenizer"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json' cannot be read"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "of a 'llama' model"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "b.safetensors"}}'
            ),
            "names b.safetensors, which is missing",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"torn"), "cannot be read"),
        (lambda folder: (folder.parents[1] / "metrics.jsonl").write_text("{"), "the run .* cannot be read"),
        (
            lambda folder: (folder / "training_state" / "manifest.json").write_text(
                json.dumps({"files": {"config.json": {"bytes": 1, "sha256": ""}}})
            ),
            "is damaged: config.json has",
        ),
    ],
)
def test_what_is_no_whole_checkpoint_is_refused(server, copied, change, says):
    change(copied)
    with pytest.raises(HubError, match=says):
        prepare_upload(copied, "me/model")
    assert main(["push", str(copied), "me/model"]) == 2
    assert server.log == []  # nobody was asked


def results_file(path, checkpoint, **changes):
    result = {
        "results": {
            "hellaswag": {"acc_norm": 0.2955, "acc_norm_stderr": 0.0046, "n": 10042},
            "lambada": {"acc": 0.5, "acc_stderr": 0.1, "n": 40},
        },
        "tasks": {
            "hellaswag": {
                "version": 2,
                "data": {"source": "Rowan/hellaswag, validation", "is_sample": False},
                "figures": {"acc_norm": "the most probable a token"},
                "full_size": 10042,
            },
            "lambada": {
                "version": 1,
                "data": {"source": "/home/someone/lambada.jsonl, the first 40", "is_sample": False},
                "figures": {"acc": "last words"},
                "full_size": 5153,
            },
        },
        "model": {"name": str(checkpoint)},
        "published": {"OpenAI GPT-2 124M": {"hellaswag": {"acc_norm": 0.2955}}},
    }
    path.write_text(json.dumps(result | changes))
    return path


def test_the_card_says_what_it_is_and_where_it_comes_from(checkpoint, tmp_path):
    results = results_file(tmp_path / "results.json", checkpoint)
    text = prepare_upload(checkpoint, "me/model", results=[results]).files["README.md"].decode()
    for words in (
        'AutoModelForCausalLM.from_pretrained("me/model", trust_remote_code=True)',
        "import modeling_gpt2repro",
        "to_gpt2()",
        "3,324,736 parameters: 2 layers, 64 wide, 4 heads",
        "from a random start on 5,120 tokens (step 20)",
        "[HuggingFaceFW/fineweb-edu](https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu), subset `sample-10BT`",
        f"revision `{'b' * 40}`",
        "Recipe: `tiny`, step 20 of 20",
        "8 x NVIDIA H100",
        "Time: 1.0 hours",
        "about $24.00, an estimate at $3.00 an hour and device",
        f"commit `{'e' * 40}`, with uncommitted changes",
        "tokens_per_step: 256",
        "![losses and HellaSwag over training tokens](curves.png)",
        "| validation loss | 3.2924 |",
        "| hellaswag acc_norm | 0.2955 ± 0.0046 | 0.2955 (OpenAI GPT-2 124M) | the most probable a token |",
        "lambada.jsonl, the first 40",
        "## Limitations",
        "radford2019language",
    ):
        assert words in text, words
    assert "someone" not in text  # nobody's folders

    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "mit")
    assert data.datasets == ["HuggingFaceFW/fineweb-edu"]
    assert {"gpt2", "gpt2-repro"} <= set(data.tags)
    loss, hellaswag = data.eval_results  # 40 items of LAMBADA are not its score
    assert (loss.dataset_type, loss.metric_type, loss.metric_value) == ("HuggingFaceFW/fineweb-edu", "loss", 3.2924)
    assert loss.dataset_revision == "b" * 40
    assert (hellaswag.dataset_type, hellaswag.metric_type, hellaswag.metric_value) == (
        *("Rowan/hellaswag", "acc_norm", 0.2955),
    )
    assert hellaswag.metric_args == {"n": 10042, "stderr": 0.0046, "task_version": 2}


def test_results_of_something_else_are_refused(checkpoint, tmp_path):
    with pytest.raises(HubError, match="is of '/elsewhere', not of"):
        prepare_upload(checkpoint, "me/model", results=[results_file(tmp_path / "a.json", "/elsewhere")])
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(HubError, match="is no file of `python -m eval --output`"):
        prepare_upload(checkpoint, "me/model", results=[tmp_path / "b.json"])


def test_a_checkpoint_without_its_run_has_a_card_too(copied, server, capsys):
    alone = copied.parents[2] / "alone"
    copied.rename(alone)
    shutil.rmtree(alone / "training_state")
    assert main(["push", str(alone), "me/model", "--dry_run"]) == 0
    assert server.log == []
    text = capsys.readouterr().out
    assert "## Use" in text and "## Training" not in text and "curves" not in text
