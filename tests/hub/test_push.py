"""Pushing checkpoints: the files and the card, the commit, and faults of the network and the Hub."""

import json
import logging
import re
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from hub_server import READ_TOKEN, TOKEN
from huggingface_hub import ModelCard, constants, parse_eval_result_entries

from common.weights import weights_sha256
from hub import HubError
from hub.__main__ import main
from hub.push import Repository, collect_files

FOLDER = Path(__file__).parent
CODE = {"configuration_gpt2repro.py", "modeling_gpt2repro.py", "loss.py", "mlp.py", "conversion.py"}
FILES = CODE | {
    *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("LICENSE", "README.md", "curves.png"),
}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """Retries of huggingface_hub without the pauses between them."""
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda _: None, time=time.time))


def plan_of(checkpoint, **options):
    return collect_files(checkpoint, "me/model", **options)


def card_of(checkpoint, **options):
    return plan_of(checkpoint, **options).files["README.md"].decode()


def change(path, *keys, **values):
    """Change values of a JSON file's object, or of the object under its keys."""
    content = target = json.loads(path.read_text())
    for key in keys:
        target = target[key]
    target.update(values)
    path.write_text(json.dumps(content))


@torch.no_grad()
def test_pushed_model_opens_without_this_project(
    server, checkpoint, model, tokenizer, launch, environment, tmp_path, capsys
):
    """Pushed by the command, and by transformers' own push_to_hub: other processes get the same logits."""
    assert main(["push", str(checkpoint), "me/model"]) == 0
    assert "me/model (private)" in capsys.readouterr().out
    files = server.repos["models/me/model"]
    assert files.keys() == FILES  # no training_state
    assert files["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    assert server.private == {"models/me/model"}
    assert [title for _, title in server.commits["models/me/model"]] == ["Step 20"]

    pushed = launch(checkpoint, "me/alone", script=FOLDER / "push_alone.py", environment=environment)
    assert server.repos["models/me/alone"].keys() >= FILES - {"LICENSE", "curves.png"}

    names = ("me/model", "me/alone")
    pulled = launch(tmp_path / "logits-", *names, script=FOLDER / "pull.py", environment=environment)
    assert TOKEN not in pushed.stdout + pushed.stderr + pulled.stdout + pulled.stderr
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
def test_push_survives_fault(server, checkpoint, pattern, fault):
    server.faults = [(pattern, fault)]
    url, _ = Repository("me/model").push(plan_of(checkpoint))
    assert server.faults == []
    assert server.repos["models/me/model"].keys() == FILES
    [(commit, _)] = server.commits["models/me/model"]  # one, also if its answer was lost
    assert url == f"{server.address}/me/model/commit/{commit}"


def test_failed_push_leaves_no_files_and_next_push_reuses_uploads(server, checkpoint):
    repository = Repository("me/model")
    server.faults = [("/commit/", "drop")] * 20
    with pytest.raises(HubError, match="tried 6 times"):
        repository.push(plan_of(checkpoint))
    assert server.repos["models/me/model"] == {}
    server.faults = []
    sent = server.log.copy()
    repository.push(plan_of(checkpoint))
    assert not [path for method, path in server.log[len(sent) :] if method == "PUT"]
    assert server.repos["models/me/model"].keys() == FILES


@pytest.mark.parametrize(
    ("fault", "message", "files", "attempts"),
    [
        ("overtaken", r"me/model has changed since this push began \(HTTP 412.*Nothing was pushed", {"theirs.txt"}, 1),
        # Only the commits of the repository tell that the first attempt did not arrive before someone else's commit.
        ("dropped and overtaken", "has changed since this push began", {"theirs.txt"}, 2),
        (403, r"the token may not write to me/model \(HTTP 403", set(), 1),  # from the Hub, not from its storage
        (413, r"could not be pushed to .* \(HTTP 413", set(), 1),
    ],
    ids=str,
)
def test_final_error_is_not_retried(server, checkpoint, fault, message, files, attempts):
    server.faults = [("/commit/", fault)]
    with pytest.raises(HubError, match=message):
        Repository("me/model").push(plan_of(checkpoint))
    assert server.repos["models/me/model"].keys() == files
    assert len([path for method, path in server.log if method == "POST" and "/commit/" in path]) == attempts


def test_lost_answer_is_recognized_below_another_commit(server, checkpoint):
    server.faults = [("/commit/", "lost and overtaken")]
    url, _ = Repository("me/model").push(plan_of(checkpoint))
    assert url.endswith(server.commits["models/me/model"][0][0])
    assert server.repos["models/me/model"].keys() == FILES | {"theirs.txt"}


def test_repository_check_is_read_only(server):
    assert Repository("team/model").is_private  # an organization of the token's owner
    assert server.repos == {} and {method for method, _ in server.log} == {"GET"}


def test_push_to_existing_repository_deletes_stale_weights_in_the_same_commit(server, copied):
    stale = {"model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin"}
    others = {"notes.md", "adapter_model.safetensors", "onnx/model.safetensors"}
    server.repos["models/me/model"] = dict.fromkeys({"model.safetensors"} | stale | others, b"old")
    with pytest.raises(HubError, match="me/model exists and is public: give --public"):
        Repository("me/model")
    repository = Repository("me/model", private=False)
    assert not repository.is_private
    _, removed = repository.push(plan_of(copied))
    assert set(removed) == stale
    assert len(server.commits["models/me/model"]) == 1
    assert server.repos["models/me/model"].keys() == FILES | others
    assert server.repos["models/me/model"]["model.safetensors"] == (copied / "model.safetensors").read_bytes()
    repository.push(plan_of(copied))
    assert len(server.commits["models/me/model"]) == 1  # nothing new, no commit
    (copied / "README.md").write_text("# My own words\n")
    repository.push(plan_of(copied))
    assert server.repos["models/me/model"]["README.md"] == b"# My own words\n"
    assert len(server.commits["models/me/model"]) == 2


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("me/model", "", "run `hf auth login` or set HF_TOKEN"),
        ("me/model", "hf_wrongwrongwrong", "rejected the token"),
        ("me/model", READ_TOKEN, "the token 'mine' of me is read-only"),
        ("me/model", "hf_s\xe9cret", "invalid characters"),
        ("you/model", TOKEN, "the token belongs to me, who may not write to you's you/model"),
    ],
)
def test_push_without_access_ends_with_one_line(server, checkpoint, monkeypatch, capsys, name, token, message):
    monkeypatch.setenv("HF_TOKEN", token)
    assert main(["push", str(checkpoint), name]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error)
    assert not server.repos
    assert not token or token not in error


def test_push_without_network(server, checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("common.hub.ATTEMPTS", 2)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["push", str(checkpoint), "me/model"]) == 2
    assert re.search("could not be pushed to http://127.0.0.1:9 .*tried 2 times", capsys.readouterr().err)


def text_of(error):
    """Return all text that a log or a debugger can find in an exception, its causes and their requests."""
    text = "".join(traceback.format_exception(error)) + repr(vars(error))
    if (response := getattr(error, "response", None)) is not None:
        text += repr(list(response.request.headers.items()))
    return text + "".join(text_of(other) for other in (error.__cause__, error.__context__) if other is not None)


def test_token_is_in_no_output(server, checkpoint, capsys, caplog):
    caplog.set_level(logging.DEBUG)
    Repository("me/model").push(plan_of(checkpoint))
    server.faults = [("/commit/", 400)]
    repository = Repository("me/other")
    with pytest.raises(HubError) as raised:
        repository.push(plan_of(checkpoint))
    error = text_of(raised.value)
    captured = capsys.readouterr()
    assert "HTTP 400" in error
    for text in (error, captured.out, captured.err, caplog.text, repr(server.log)):
        assert TOKEN not in text
    for content in server.repos["models/me/model"].values():
        assert TOKEN.encode() not in content


def shard_weights(folder, index):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "has no tokenizer"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json' cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json' cannot be read .*not a JSON object"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'),
            "is a 'llama' model.*README.md",
        ),
        (lambda folder: change(folder / "config.json", n_head=5), "cannot be opened .*n_head"),
        (lambda folder: shard_weights(folder, '{"weight_map": {"a": "b.safetensors"}}'), "names b.safetensors, which"),
        (lambda folder: shard_weights(folder, '{"weight_map": ["a"]}'), "has no weight_map that names files"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "remove the stale one"),
        (lambda folder: (folder / "README.md").write_bytes(b"\xff"), "README.md' is not UTF-8 text"),
    ],
)
def test_incomplete_checkpoint_is_rejected_before_the_network(server, standalone, capsys, damage, message):
    damage(standalone)
    assert main(["push", str(standalone), "me/model"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
    assert server.log == []


def test_damaged_checkpoint_is_rejected(copied):
    change(copied / "config.json", n_layer=3)
    with pytest.raises(HubError, match=r"is damaged: config.json has .* bytes and not"):
        plan_of(copied)
    (copied / "training_state" / "manifest.json").unlink()
    with pytest.raises(HubError, match=r"is damaged: training_state/manifest.json is missing"):
        plan_of(copied)


@pytest.mark.parametrize(
    ("path", "content"),
    [
        *(("metrics.jsonl", text) for text in ("{\n{}\n", "5\n5\n", '{"step": "1"}\n', '{"step": 1, "ms": "fast"}\n')),
        *(("provenance.json", text) for text in ("{", "[]", "null", '{"config": 5}', "[" * 100_000)),
        *(("provenance.json", {name: 5}) for name in ("hardware", "data", "versions", "code", "earlier_launches")),
        *(("checkpoints/step_000020/training_state/state.json", text) for text in ("{}", "[]", '{"step": null}')),
    ],
)
def test_unreadable_run_is_rejected(copied, write_manifest, capsys, path, content):
    run = copied.parents[1]
    if isinstance(content, dict):
        change(run / path, **content)
    else:
        (run / path).write_text(content)
    write_manifest(copied)
    assert main(["push", str(copied), "me/model", "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"error: run '.*copy'.* cannot be read", error) and error.count("\n") == 1


def test_pickles_hidden_files_and_training_state_are_not_pushed(standalone, write_manifest):
    for path in (
        *(".hidden", "sub/.hidden", "training_state/state.json", "pytorch_model.bin", "sub/weights.bin"),
        *("a.pt", "a.pth", "a.pkl", "sub/a.pickle", "a.ckpt", "checkpoint-5/trainer_state.json"),
    ):
        (standalone / path).parent.mkdir(exist_ok=True)
        (standalone / path).write_text("x")
    write_manifest(standalone)
    (standalone / "sub" / "notes.txt").write_text("kept")
    assert plan_of(standalone).files.keys() == FILES - {"curves.png"} | {"sub/notes.txt"}


def test_license_of_the_project_is_not_added_to_another(standalone):
    (standalone / "License.md").write_text("theirs")
    assert plan_of(standalone).files.keys() == FILES - {"curves.png", "LICENSE"} | {"License.md"}
    (standalone / "License.md").rename(standalone / "LICENSE")
    assert plan_of(standalone).files["LICENSE"] == standalone / "LICENSE"


def results_file(path, checkpoint, **changes):
    def about(version, source, full_size, metric, protocol):
        data = {"source": source, "sha256": "f" * 64, "is_sample": False}
        return {"version": version, "data": data, "figures": {metric: protocol}, "full_size": full_size}

    hellaswag_source = "Rowan/hellaswag (validation), all 10,042 items"
    lambada_source = "/home/some one/lambada.jsonl, all 5,153 items"
    bits_source = "runs/secret/text/, stride 3, the first 40 documents"
    result = {
        "results": {
            "hellaswag": {"acc_norm": 0.2955, "acc_norm_stderr": 0.0046, "n": 10042},
            "lambada": {"acc": 0.5, "acc_stderr": 0.1, "n": 5153},
            "bits_per_byte": {"bits_per_byte": 1.1, "n": 40},
            "lm-eval:/home/some one/mine": {"acc": 0.25},
        },
        "tasks": {
            "hellaswag": about(2, hellaswag_source, 10042, "acc_norm", "the most probable a token"),
            "lambada": about(1, lambada_source, 5153, "acc", "last words"),
            "bits_per_byte": about(1, bits_source, None, "bits_per_byte", "bits"),
            "lm-eval:/home/some one/mine": about("mine 1", "lm-eval 0.4.13, mine", None, "acc", "theirs"),
        },
        "model": {"name": "runs/x/checkpoints/best", "weights_sha256": weights_sha256(checkpoint)},
        "published": {"OpenAI GPT-2 124M": {"hellaswag": {"acc_norm": 0.2955}}},
    }
    path.write_text(json.dumps(result | changes))
    return path


CARD_WORDS = f"""
AutoModelForCausalLM.from_pretrained("me/model", trust_remote_code=True)
import modeling_gpt2repro
to_gpt2()
3,324,736 parameters: 2 layers, 64 wide, 4 heads
from a random start on 5,120 tokens (step 20)
[HuggingFaceFW/fineweb-edu](https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu), subset `sample-10BT`
revision `{"b" * 40}`
tokens, GPT-2's vocabulary of 50,257.
Run: `tiny`, step 20 of 20
8 x NVIDIA H100
Time: 1.0 hours
about $24.00, estimated at $3.00 per hour and device
commit `{"e" * 40}`, with uncommitted changes
tokens_per_step: 256
![losses and HellaSwag over training tokens](curves.png)
| validation loss | 3.2924 |
| hellaswag acc_norm | 0.2955 ± 0.0046 | 0.2955 (OpenAI GPT-2 124M) | the most probable a token |
- lambada, version 1: lambada.jsonl, all 5,153 items, 5,153 items; comparable
comparable with the published acc 0.3256 (OpenAI GPT-2 124M)
- bits_per_byte, version 1: text/, stride 3, the first 40 documents, 40 items; no results of
| lm-eval:mine acc | 0.2500 |
path: fineweb-edu
hellaswag: items.jsonl
## Limitations
radford2019language
""".strip().splitlines()


def test_card_has_the_facts_of_the_run(checkpoint, tmp_path):
    results = results_file(tmp_path / "results.json", checkpoint)
    text = card_of(checkpoint, results=[results])
    for words in CARD_WORDS:
        assert words in text, words
    assert "some one" not in text and "secret" not in text  # folders of the training machine

    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "mit")
    assert data.datasets == ["HuggingFaceFW/fineweb-edu"]
    assert {"gpt2", "gpt2-repro"} <= set(data.tags)
    loss, hellaswag = data.eval_results  # not LAMBADA: it came from a local file
    assert (loss.dataset_type, loss.metric_type, loss.metric_value) == ("HuggingFaceFW/fineweb-edu", "loss", 3.2924)
    assert loss.dataset_revision == "b" * 40
    assert (hellaswag.dataset_type, hellaswag.metric_type) == ("Rowan/hellaswag", "acc_norm")
    assert hellaswag.metric_value == 0.2955
    assert hellaswag.metric_args == {"n": 10042, "stderr": 0.0046, "task_version": 2}


@pytest.mark.parametrize(("n", "source"), [(40, "all 40"), (10042, "all 10,042")])
def test_metadata_has_only_scores_of_full_data_sets(checkpoint, tmp_path, n, source):
    path = results_file(tmp_path / "results.json", checkpoint)
    change(path, "results", "hellaswag", n=n)
    revision = "d" * 40
    change(
        path, "tasks", "hellaswag", "data", source=f"Rowan/hellaswag (validation, revision {revision}), {source} items"
    )
    files = collect_files(checkpoint, "user/name", results=[path]).files
    card = files["README.md"].decode()
    assert len(ModelCard(card).data.eval_results) == (2 if n == 10042 else 1)
    if n != 10042:
        assert "not comparable: published results are for all 10,042 items, and these are for 40" in card
        assert ".eval_results/hellaswag.yaml" not in files
        return
    content = yaml.safe_load(files[".eval_results/hellaswag.yaml"])
    [entry] = parse_eval_result_entries(content)  # as huggingface_hub reads the Hub's answer
    assert (entry.dataset_id, entry.task_id, entry.value) == ("Rowan/hellaswag", "acc_norm", 0.2955)
    assert entry.dataset_revision == revision
    assert entry.notes.startswith("the most probable a token; 10,042 items of validation, standard error 0.0046; ")
    assert "python -m eval --model MODEL --tasks hellaswag" in entry.notes


def test_results_of_other_weights_are_rejected(standalone, tmp_path):
    path = results_file(tmp_path / "a.json", standalone, published=None)
    (tmp_path / "link").symlink_to(standalone)
    assert "hellaswag acc_norm" in card_of(tmp_path / "link", results=[path])  # the weights decide, not the name
    weights = (standalone / "model.safetensors").read_bytes()
    (standalone / "model.safetensors").write_bytes(weights[:-1] + b"x")
    with pytest.raises(HubError, match=r"scores other weights \(runs/x/checkpoints/best\): score .* again"):
        card_of(standalone, results=[path])
    results_file(path, standalone, model={"name": str(standalone)})
    with pytest.raises(HubError, match=r"does not record the scored weights: score .* again"):
        card_of(standalone, results=[path])


@pytest.mark.parametrize(
    "changes",
    [
        *({"results": None}, {"results": {"hellaswag": 5}}, {"tasks": {}}, {"tasks": {"hellaswag": {"figures": []}}}),
        *({"model": "mine"}, {"published": ["OpenAI"]}, None),
    ],
    ids=str,
)
def test_file_that_is_not_results_is_rejected(checkpoint, tmp_path, changes):
    path = results_file(tmp_path / "a.json", checkpoint, **(changes or {}))
    if changes is None:
        path.write_text("[]")
    with pytest.raises(HubError, match="is not a file of `python -m eval --output`"):
        card_of(checkpoint, results=[path])


@pytest.mark.parametrize(
    ("provenance", "init_from", "base_model", "start"),
    [
        ({}, None, None, "Trained from a random start on"),
        ({}, "openai-community/gpt2", "openai-community/gpt2", "from the weights of openai-community/gpt2 on"),
        ({"init_from_is_folder": False}, "gpt2", "gpt2", "from the weights of gpt2 on"),
        ({"init_from_is_folder": True}, "secret/mine", None, "from the weights of mine on"),
        ({}, "runs/copy", None, "from the weights of copy on"),  # a folder next to the run's
        ({}, "/home/some one/secret/step_000100", None, "from the weights of step_000100 on"),
        (
            {"earlier_launches": [{"config": {"init_from": "openai-community/gpt2"}, "from_step": 0}]},
            *(None, "openai-community/gpt2", "from the weights of openai-community/gpt2 on"),
        ),
        ({"from_step": 10}, None, None, "Trained on"),  # continues a checkpoint of another run
    ],
)
def test_card_names_initial_weights_and_license(copied, provenance, init_from, base_model, start):
    change(copied.parents[1] / "provenance.json", **provenance)
    change(copied.parents[1] / "provenance.json", "config", init_from=init_from)
    text = card_of(copied)
    assert start in text and "secret" not in text and "some one" not in text
    data = ModelCard(text).data
    assert data.base_model == base_model
    is_own = "random" in start
    assert data.license == ("mit" if is_own else None)
    assert ("LICENSE covers the modeling files, not the weights" in text) == (not is_own)
    (copied / "LICENSE.txt").write_text("theirs")
    assert ModelCard(card_of(copied)).data.license is None


def test_card_tells_the_folders_of_a_mixture_apart(copied):
    mix = {"/home/some one/web/shards": 0.7, "/home/some one/code/shards": 0.3}
    change(copied.parents[1] / "provenance.json", "config", data={"path": None, "mix": mix})
    change(copied.parents[1] / "provenance.json", "data", source=None)
    text = card_of(copied)
    assert "a mixture of `web/shards` (weight 0.7), `code/shards` (weight 0.3)" in text and "some one" not in text


def test_card_of_an_interrupted_run(copied, write_manifest):
    """metrics.jsonl ends in half a line, and config.json leaves defaults to its class."""
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


def test_dry_run_prints_the_card_of_a_checkpoint_outside_a_run(standalone, server, capsys):
    assert main(["push", str(standalone), "me/model", "--dry_run"]) == 0
    assert server.log == []
    text = capsys.readouterr().out
    assert "## Use" in text and "## Training" not in text and "curves" not in text
    assert ModelCard(card_of(standalone)).data.license is None
    change(standalone / "config.json", model_type="gpt2")
    assert "LICENSE" not in plan_of(standalone).files  # a plain GPT-2 has no modeling files of this project
