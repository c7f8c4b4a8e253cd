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

from eval.checkpoint import weights_sha256
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
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    ids = tokenizer("Hello, I'm a language model,", return_tensors="pt").input_ids
    torch.save(model(ids).logits.detach(), %r + name.replace("/", "-"))
"""


def upload_of(checkpoint):
    return prepare_upload(checkpoint, "me/model")


@pytest.fixture
def copied(whole_run, tmp_path):
    """A checkpoint that a test may change, in a run of its own."""
    shutil.copytree(whole_run, tmp_path / "runs" / "copy")
    return tmp_path / "runs" / "copy" / "checkpoints" / "step_000020"


@pytest.fixture
def alone(copied):
    """One that is in no run."""
    folder = copied.parents[2] / "alone"
    copied.rename(folder)
    shutil.rmtree(folder / "training_state")
    return folder


def change(path, *keys, **values):
    """Changes an object of a JSON file, or what is below its keys."""
    content = place = json.loads(path.read_text())
    for key in keys:
        place = place[key]
    place.update(values)
    path.write_text(json.dumps(content))


def card_of(folder, **more):
    return prepare_upload(folder, "me/model", **more).files["README.md"].decode()


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
    [
        *(("PUT", "drop"), ("PUT", 500), ("PUT", 403)),  # 403: of storage, whose addresses expire
        *(("/commit/", "drop"), ("/commit/", "lost"), ("/commit/", 503), ("repo", 429)),
    ],
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


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("overtaken", r"me/model has changed since this push began \(HTTP 412.*Nothing of this push is there"),
        (403, r"this machine's token may not write to me/model \(HTTP 403"),  # the Hub's own
    ],
    ids=str,
)
def test_what_is_final_is_asked_once(server, checkpoint, fault, says):
    server.faults = [("/commit/", fault)]
    with pytest.raises(HubError, match=says):
        Repository("me/model").push(upload_of(checkpoint))
    assert server.repos["models/me/model"].keys() == ({"theirs.txt"} if fault == "overtaken" else set())
    assert len([path for _, path in server.log if "/commit/" in path]) == 1


@pytest.mark.parametrize("size", [10, 2000], ids=["small", "large"])
def test_somebody_elses_commit_is_not_taken_for_this_one(server, alone, size):
    """All of the names are there, and the content of one is another's."""
    (alone / "notes.txt").write_text("x" * size)
    repository = Repository("me/model")
    repository.push(upload_of(alone))
    (alone / "notes.txt").write_text("y" * size)
    server.faults = [("/commit/", "dropped and overtaken")]
    with pytest.raises(HubError, match=r"somebody else pushed\. Whether this push came before is not known"):
        repository.push(upload_of(alone))
    assert server.repos["models/me/model"]["notes.txt"] == b"x" * size


def test_asking_changes_nothing(server):
    """Also for an organisation that the token's owner is in."""
    assert Repository("team/model").is_private
    assert server.repos == {} and {method for method, _ in server.log} == {"GET"}


def test_a_repository_that_exists(server, copied):
    """A second push is one more commit, on whose weights nothing stale lies; a public one is not taken for private."""
    stale = {"model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin"}
    others = {"notes.md", "adapter_model.safetensors", "onnx/model.safetensors"}
    files = dict.fromkeys({"model.safetensors"} | stale | others, b"old")
    server.repos["models/me/model"] = dict(files)
    with pytest.raises(HubError, match="me/model exists and everybody can see it: say --public"):
        Repository("me/model")
    repository = Repository("me/model", private=False)
    assert not repository.is_private
    _, removed = repository.push(upload_of(copied))
    assert set(removed) == stale
    assert server.repos["models/me/model"].keys() == FILES | others
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
        ("me/model", "", "run `hf auth login` or set HF_TOKEN"),
        ("me/model", "hf_wrongwrongwrong", "does not accept this machine's token"),
        ("me/model", READ_TOKEN, "the token 'mine' of me may only read"),
        ("me/model", "hf_s\xe9cret", "characters that no token has"),
        ("you/model", TOKEN, "the token is me's, who may not write to you's you/model"),
        ("model", TOKEN, "'model' does not say whose repository it is: give USER/model"),
        ("me/mo del", TOKEN, "'me/mo del' is not the name of a repository"),
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


def all_of(error):
    """What a debugger or a log could find in an exception: its text and those that it leads to, with their requests."""
    text = "".join(traceback.format_exception(error)) + repr(vars(error))
    if (response := getattr(error, "response", None)) is not None:
        text += repr(list(response.request.headers.items()))
    return text + "".join(all_of(other) for other in (error.__cause__, error.__context__) if other is not None)


def test_the_token_is_nowhere(server, checkpoint, capsys, caplog):
    caplog.set_level(logging.DEBUG)
    Repository("me/model").push(upload_of(checkpoint))
    server.faults = [("/commit/", 400)]
    (repository := Repository("me/other"))
    with pytest.raises(HubError) as raised:
        repository.push(upload_of(checkpoint))
    told = all_of(raised.value)
    captured = capsys.readouterr()
    assert "HTTP 400" in told
    for text in (told, captured.out, captured.err, caplog.text, repr(server.log)):
        assert TOKEN not in text
    for content in server.repos["models/me/model"].values():
        assert TOKEN.encode() not in content


def in_shards(folder, index):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)


@pytest.mark.parametrize(
    ("breaks", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "has no tokenizer"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json' cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json' cannot be read .*no JSON object"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "of a 'llama' model"),
        (lambda folder: change(folder / "config.json", n_head=5), "config.json' is no config of a GPT-2 .*n_head"),
        (lambda folder: in_shards(folder, '{"weight_map": {"a": "b.safetensors"}}'), "names b.safetensors, which is"),
        (lambda folder: in_shards(folder, '{"weight_map": ["a"]}'), "has no weight_map that names files"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "remove the stale one"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"torn"),
            "model.safetensors has 4 bytes and is not",
        ),
        (lambda folder: (folder / "README.md").write_bytes(b"\xff"), "README.md' is not UTF-8 text"),
    ],
)
def test_what_is_no_whole_checkpoint_is_refused(server, alone, capsys, breaks, says):
    breaks(alone)
    assert main(["push", str(alone), "me/model"]) == 2
    error = capsys.readouterr().err
    assert re.search(says, error) and error.count("\n") == 1
    assert server.log == []  # nobody was asked


def test_a_damaged_checkpoint_is_refused(copied):
    change(copied / "config.json", n_layer=3)
    with pytest.raises(HubError, match=r"is damaged: config.json has .* bytes and not"):
        upload_of(copied)
    (copied / "training_state" / "manifest.json").unlink()
    with pytest.raises(HubError, match=r"is damaged: no training_state/manifest.json"):
        upload_of(copied)


@pytest.mark.parametrize(
    ("path", "content"),
    [
        *(("metrics.jsonl", text) for text in ("{\n{}\n", "5\n5\n", '{"step": "1"}\n', '{"step": 1, "ms": "fast"}\n')),
        *(("provenance.json", text) for text in ("{", "[]", "null", '{"config": 5}', "[" * 100_000)),
        *(("provenance.json", {name: 5}) for name in ("hardware", "data", "versions", "code", "earlier_launches")),
        *(("checkpoints/step_000020/training_state/state.json", text) for text in ("{}", "[]", '{"step": null}')),
    ],
)
def test_a_run_that_cannot_be_read_is_refused(copied, write_manifest, capsys, path, content):
    run = copied.parents[1]
    if isinstance(content, dict):
        change(run / path, **content)
    else:
        (run / path).write_text(content)
    write_manifest(copied)
    assert main(["push", str(copied), "me/model", "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert re.search("the run .* cannot be read|provenance.json' or metrics.jsonl beside it is not as", error)
    assert error.count("\n") == 1


def test_a_name_that_cannot_be_one(capsys):
    for command in (["push", "a" * 300, "me/model"], ["export", "a" * 300, "--to", "gpt2", "--out", "x"]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "File name too long" in error and error.count("\n") == 1


def test_what_is_left_out(alone, write_manifest):
    """What runs code when it is opened, what is hidden, what only resuming reads; and no LICENSE beside another."""
    for path in (
        *(".hidden", "sub/.hidden", "training_state/state.json", "pytorch_model.bin", "sub/weights.bin"),
        *("a.pt", "a.pth", "a.pkl", "sub/a.pickle", "a.ckpt"),
    ):
        (alone / path).parent.mkdir(exist_ok=True)
        (alone / path).write_text("x")
    write_manifest(alone)
    (alone / "sub" / "notes.txt").write_text("kept")
    assert upload_of(alone).files.keys() == FILES - {"curves.png"} | {"sub/notes.txt"}
    (alone / "License.md").write_text("theirs")
    assert upload_of(alone).files.keys() == FILES - {"curves.png", "LICENSE"} | {"sub/notes.txt", "License.md"}
    (alone / "License.md").rename(alone / "LICENSE")
    assert upload_of(alone).files["LICENSE"] == alone / "LICENSE"


def results_file(path, checkpoint, **changes):
    def about(version, source, full_size, figure, what, **more):
        data = {"source": source, "sha256": "f" * 64, "is_sample": False}
        return {"version": version, "data": data | more, "figures": {figure: what}, "full_size": full_size}

    result = {
        "results": {
            "hellaswag": {"acc_norm": 0.2955, "acc_norm_stderr": 0.0046, "n": 10042},
            "lambada": {"acc": 0.5, "acc_stderr": 0.1, "n": 5153},
            "bits_per_byte": {"bits_per_byte": 1.1, "n": 40},
        },
        "tasks": {
            "hellaswag": about(
                *(2, "Rowan/hellaswag (validation), all 10,042 items", 10042),
                *("acc_norm", "the most probable a token"),
            ),
            "lambada": about(
                *(1, "/home/some one/lambada.jsonl, all 5,153 items", 5153, "acc", "last words"),
            ),
            "bits_per_byte": about(
                *(1, "runs/secret/text/, stride 3, the first 40 documents", None, "bits_per_byte", "bits"),
            ),
        },
        "model": {"name": "runs/x/checkpoints/best", "weights_sha256": weights_sha256(checkpoint)},
        "published": {"OpenAI GPT-2 124M": {"hellaswag": {"acc_norm": 0.2955}}},
    }
    path.write_text(json.dumps(result | changes))
    return path


def test_the_card_says_what_it_is_and_where_it_comes_from(checkpoint, tmp_path):
    results = results_file(tmp_path / "results.json", checkpoint)
    text = card_of(checkpoint, results=[results])
    for words in (
        'AutoModelForCausalLM.from_pretrained("me/model", trust_remote_code=True)',
        "import modeling_gpt2repro",
        "to_gpt2()",
        "3,324,736 parameters: 2 layers, 64 wide, 4 heads",
        "from a random start on 5,120 tokens (step 20)",
        "[HuggingFaceFW/fineweb-edu](https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu), subset `sample-10BT`",
        f"revision `{'b' * 40}`",
        "tokens, GPT-2's vocabulary of 50,257.",
        "Run: `tiny`, step 20 of 20",
        "8 x NVIDIA H100",
        "Time: 1.0 hours",
        "about $24.00, an estimate at $3.00 an hour and device",
        f"commit `{'e' * 40}`, with uncommitted changes",
        "tokens_per_step: 256",
        "![losses and HellaSwag over training tokens](curves.png)",
        "| validation loss | 3.2924 |",
        "| hellaswag acc_norm | 0.2955 ± 0.0046 | 0.2955 (OpenAI GPT-2 124M) | the most probable a token |",
        "- lambada, version 1: lambada.jsonl, all 5,153 items, 5,153 items",
        "- bits_per_byte, version 1: text/, stride 3, the first 40 documents, 40 items",
        "path: fineweb-edu",
        "hellaswag: items.jsonl",
        "## Limitations",
        "radford2019language",
    ):
        assert words in text, words
    assert "some one" not in text and "secret" not in text  # nobody's folders

    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "mit")
    assert data.datasets == ["HuggingFaceFW/fineweb-edu"]
    assert {"gpt2", "gpt2-repro"} <= set(data.tags)
    loss, hellaswag = data.eval_results  # of the others nobody can say that they are the data set of that name
    assert (loss.dataset_type, loss.metric_type, loss.metric_value) == ("HuggingFaceFW/fineweb-edu", "loss", 3.2924)
    assert loss.dataset_revision == "b" * 40
    assert (hellaswag.dataset_type, hellaswag.metric_type, hellaswag.metric_value) == (
        *("Rowan/hellaswag", "acc_norm", 0.2955),
    )
    assert hellaswag.metric_args == {"n": 10042, "stderr": 0.0046, "task_version": 2}


@pytest.mark.parametrize(("n", "source"), [(40, "all 40"), (10042, "all 10,042")])
def test_a_part_is_not_the_score(checkpoint, tmp_path, n, source):
    path = results_file(tmp_path / "results.json", checkpoint)
    change(path, "results", "hellaswag", n=n)
    change(path, "tasks", "hellaswag", "data", source=f"Rowan/hellaswag (validation), {source} items")
    data = ModelCard(card_of(checkpoint, results=[path])).data
    assert len(data.eval_results) == (2 if n == 10042 else 1)


def test_results_of_something_else_are_refused(alone, tmp_path):
    path = results_file(tmp_path / "a.json", alone, published=None)
    (tmp_path / "link").symlink_to(alone)
    assert "hellaswag acc_norm" in card_of(tmp_path / "link", results=[path])  # it is the weights that count
    weights = (alone / "model.safetensors").read_bytes()
    (alone / "model.safetensors").write_bytes(weights[:-1] + b"x")
    with pytest.raises(HubError, match=r"is of other weights \(runs/x/checkpoints/best\): score .* again"):
        card_of(alone, results=[path])
    results_file(path, alone, model={"name": str(alone)})
    with pytest.raises(HubError, match=r"does not say of which weights it is: score .* again"):
        card_of(alone, results=[path])


@pytest.mark.parametrize(
    "changes",
    [
        {"results": None},
        {"results": {"hellaswag": 5}},
        {"tasks": {}},
        {"tasks": {"hellaswag": {"figures": []}}},
        {"model": "mine"},
        {"published": ["OpenAI"]},
    ],
    ids=str,
)
def test_what_is_no_result(checkpoint, tmp_path, changes):
    path = results_file(tmp_path / "a.json", checkpoint, **changes)
    with pytest.raises(HubError, match="is no file of `python -m eval --output`"):
        card_of(checkpoint, results=[path])
    path.write_text("[]")
    with pytest.raises(HubError, match="is no file of `python -m eval --output`"):
        card_of(checkpoint, results=[path])


@pytest.mark.parametrize(
    ("provenance", "init_from", "base_model", "start"),
    [
        ({}, None, None, "Trained from a random start on"),
        ({}, "openai-community/gpt2", "openai-community/gpt2", "from the weights of openai-community/gpt2 on"),
        ({"init_from_is_folder": False}, "gpt2", "gpt2", "from the weights of gpt2 on"),
        ({"init_from_is_folder": True}, "secret/mine", None, "from the weights of mine on"),
        ({}, "runs/copy", None, "from the weights of copy on"),  # a folder beside the run's
        ({}, "/home/some one/secret/step_000100", None, "from the weights of step_000100 on"),
        (
            {"earlier_launches": [{"config": {"init_from": "openai-community/gpt2"}, "from_step": 0}]},
            *(None, "openai-community/gpt2", "from the weights of openai-community/gpt2 on"),
        ),
        ({"from_step": 10}, None, None, "Trained on"),  # another run's checkpoint
    ],
)
def test_whose_weights_it_began_from(copied, provenance, init_from, base_model, start):
    change(copied.parents[1] / "provenance.json", **provenance)
    change(copied.parents[1] / "provenance.json", "config", init_from=init_from)
    text = card_of(copied)
    assert start in text and "secret" not in text and "some one" not in text
    data = ModelCard(text).data
    assert data.base_model == base_model
    is_own = "random" in start
    assert data.license == ("mit" if is_own else None)
    assert ("LICENSE is theirs, not the weights'" in text) == (not is_own)
    (copied / "LICENSE.txt").write_text("theirs")
    assert ModelCard(card_of(copied)).data.license is None


def test_a_card_of_a_run_that_was_cut_short(copied, write_manifest):
    """The last line is torn; and the numbers that config.json does not say are those of its class."""
    with (copied.parents[1] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "val_')
    config = json.loads((copied / "config.json").read_text())
    del config["n_layer"]
    (copied / "config.json").write_text(json.dumps(config | {"vocab_size": 50304}))
    write_manifest(copied)
    text = card_of(copied)
    assert "12 layers, 64 wide" in text and "tokens, a vocabulary of 50,304." in text
    assert "| validation loss | 3.2924 |" in text and "Time: 1.0 hours" in text
    (copied.parents[1] / "metrics.jsonl").unlink()
    assert "Time:" not in card_of(copied) and "Cost:" not in card_of(copied)


def test_a_checkpoint_without_its_run_has_a_card_too(alone, server, capsys):
    assert main(["push", str(alone), "me/model", "--dry_run"]) == 0
    assert server.log == []
    text = capsys.readouterr().out
    assert "## Use" in text and "## Training" not in text and "curves" not in text
    assert ModelCard(card_of(alone)).data.license is None
    change(alone / "config.json", model_type="gpt2")
    assert "LICENSE" not in upload_of(alone).files  # nothing of this project's is in a plain GPT-2
