"""Test LAMBADA, bits per byte, the example of a new task, and `eval.evaluate`; HellaSwag has its own file."""

import json
import math
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from data.loader import validation_batches
from data.manifest import open_split
from data.shards import write_shard
from data.tokenizer import EOT
from eval import EvalError, evaluate
from eval.bits_per_byte.task import Task as BitsPerByte
from eval.during_training import validation_loss
from eval.hellaswag.task import Task as HellaSwag
from eval.items import HubUnavailableError
from eval.lambada import task as lambada
from eval.lambada.task import Task as Lambada

ROOT = Path(__file__).parents[2]
TEXTS = ["It is the first text, and ein Mädchen liest it.", "The second: 42 words, <|endoftext|> is not one."]


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def reference(model, tokens, first):
    """Return the sum of ln p of tokens[first:], in float64."""
    with torch.no_grad():
        log_probs = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return sum(log_probs[t - 1, tokens[t]].item() for t in range(first, len(tokens)))


# ------------------------------------------------------------------------------------------------ LAMBADA


def test_full_and_split_passages_give_the_same_results(model, tokenizer, tmp_path):
    full = write(tmp_path / "full.jsonl", *({"text": text} for text in TEXTS))
    split = write(
        tmp_path / "split.jsonl",
        *({"context": context, "continuation": word} for context, word in (text.rsplit(" ", 1) for text in TEXTS)),
    )
    one, two = (evaluate(model, tokenizer, [Lambada(data=path)], keep_item_results=True) for path in (full, split))
    assert one["results"] == two["results"]
    assert one["item_results"] == two["item_results"]
    sha256s = [result["tasks"]["lambada"]["data"]["sha256"] for result in (one, two)]
    assert sha256s[0] == sha256s[1]
    for text, result in zip(TEXTS, one["item_results"]["lambada"], strict=True):
        tokens = tokenizer(text, split_special_tokens=True).input_ids
        assert result["word"] == text.split(" ")[-1]
        expected = reference(model, tokens, len(tokens) - result["num_tokens"])
        assert result["log_likelihood"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"context": "a"}, "the field 'continuation' is missing"),
        ([1], "[1] is not a JSON object with the fields context, continuation"),
        ({"text": None}, "text must be text, got None"),
        ({"text": "word"}, "context is empty"),
        ({"text": "some word "}, "continuation is empty"),
        ({"context": "a", "continuation": 5}, "continuation must be text, got 5"),
    ],
)
def test_malformed_passage_is_named(tokenizer, tmp_path, record, message):
    path = write(tmp_path / "items.jsonl", {"text": "a good one"}, record)
    with pytest.raises(EvalError, match=re.escape(f"{path}:2: {message}")):
        Lambada(data=path).load(tokenizer)


def test_error_without_network_suggests_a_local_copy(tokenizer, monkeypatch):
    def fail(*_):
        raise HubUnavailableError("the network is down")

    monkeypatch.setattr(lambada, "hub_records", fail)
    with pytest.raises(EvalError, match="the network is down"):
        Lambada().load(tokenizer)


def test_lambada_metrics_match_values_computed_by_hand():
    item_results = [
        {"log_likelihood": -1.0, "is_greedy": True},
        {"log_likelihood": -3.0, "is_greedy": False},
        {"log_likelihood": -2.0, "is_greedy": False},
    ]
    assert Lambada().compute_metrics(item_results) == pytest.approx(
        {
            **{"acc": 1 / 3, "acc_stderr": math.sqrt(1 / 3 * 2 / 3 / 2)},
            **{"perplexity": math.exp(2), "perplexity_stderr": math.exp(2) / math.sqrt(3), "n": 3},
        }
    )
    one = Lambada().compute_metrics(item_results[:1])
    assert math.isnan(one["acc_stderr"]) and math.isnan(one["perplexity_stderr"])


# ------------------------------------------------------------------------------------------ bits per byte


@pytest.fixture(scope="module")
def shards(tmp_path_factory, tokenizer):
    """Write shards with a validation split of 257 tokens: the texts repeated, each after end-of-text."""
    folder = tmp_path_factory.mktemp("shards")
    tokens = [t for text in TEXTS for t in (EOT, *tokenizer(text, split_special_tokens=True).input_ids)]
    tokens = np.array((tokens * 20)[: 64 * 4 + 1], dtype=np.uint16)
    for split in ("train", "val"):
        write_shard(folder / f"texts_{split}_000000.bin", tokens)
    return folder, tokens


def test_stride_of_the_full_context_gives_trainings_validation_loss(model, tokenizer, shards):
    folder, _ = shards
    batches = validation_batches(open_split(folder, "val"), seq_len=128, batch_size=2, max_tokens=10**6)
    loss_sum, num_tokens = validation_loss(model, batches)
    result = evaluate(model, tokenizer, [BitsPerByte(data=str(folder), stride=128)])
    metrics = result["results"]["bits_per_byte"]
    assert metrics["num_tokens"] == num_tokens == 256
    assert metrics["loss"] == pytest.approx(loss_sum / num_tokens, rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    source = result["tasks"]["bits_per_byte"]["data"]["source"]
    assert source == f"{folder}, validation split, stride 128, all 2 windows"


def test_end_of_text_counts_for_the_loss_but_has_no_bytes(model, tokenizer, shards):
    folder, tokens = shards
    task = BitsPerByte(data=str(folder), stride=128, limit=1)
    metrics = evaluate(model, tokenizer, [task])["results"]["bits_per_byte"]
    inputs = torch.from_numpy(tokens[:129].astype(np.int64))
    with torch.no_grad():
        log_probs = model(inputs[None, :-1]).logits[0].double().log_softmax(-1).gather(1, inputs[1:, None])[:, 0]
    is_text = inputs[1:] != EOT
    assert 0 < is_text.sum() < 128
    num_bytes = len(tokenizer.decode(inputs[1:][is_text]).encode())
    assert metrics["num_bytes"] == num_bytes
    assert metrics["loss"] == pytest.approx(-log_probs.mean().item(), rel=1e-5)
    expected = -log_probs[is_text].sum().item() / math.log(2) / num_bytes
    assert metrics["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_text_and_its_shards_give_the_same_metrics(model, tokenizer, tmp_path):
    text = " ".join(TEXTS[:1] * 10)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    tokens = np.array([EOT, *tokenizer(text).input_ids], dtype=np.uint16)
    for split in ("train", "val"):
        write_shard(tmp_path / f"a_{split}_000000.bin", tokens)
    text_metrics, shard_metrics = (
        evaluate(model, tokenizer, [BitsPerByte(data=str(data), stride=32)])["results"]["bits_per_byte"]
        for data in (tmp_path / "text.txt", tmp_path)
    )
    assert text_metrics == shard_metrics
    assert text_metrics["num_bytes"] == len(text.encode())


def test_documents_are_scored_separately(model, tokenizer, tmp_path):
    path = write(tmp_path / "texts.jsonl", *({"text": text} for text in TEXTS))
    full, first = (
        evaluate(model, tokenizer, [BitsPerByte(data=path, limit=limit)])["results"]["bits_per_byte"]
        for limit in (None, 1)
    )
    sums = [reference(model, [EOT, *tokenizer(t, split_special_tokens=True).input_ids], 1) for t in TEXTS]
    num_bytes = [len(text.encode()) for text in TEXTS]
    assert full["bits_per_byte"] == pytest.approx(-sum(sums) / math.log(2) / sum(num_bytes), rel=1e-5)
    assert first["bits_per_byte"] == pytest.approx(-sums[0] / math.log(2) / num_bytes[0], rel=1e-5)


def test_text_without_content_or_matching_tokenizer_is_refused(tokenizer, shards, tmp_path):
    folder, _ = shards
    other = type("Tokenizer", (), {"__call__": lambda _, texts, **__: {"input_ids": [[1]] * len(texts)}})()
    other.bos_token_id = other.eos_token_id = None
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "text.txt").write_text("word")
    for data, text_tokenizer, message in (
        (folder, other, "shards hold GPT-2's tokens, and the model has another tokenizer"),
        (tmp_path / "blank.txt", tokenizer, "blank.txt: the file has no text"),
        (tmp_path / "text.txt", other, "no beginning- or end-of-text token"),
    ):
        with pytest.raises(EvalError, match=message):
            BitsPerByte(data=str(data)).load(text_tokenizer, 128)


def test_bits_per_byte_of_windows_without_text_is_nan():
    window = {"log_likelihood": -2.0, "num_tokens": 1, "text_log_likelihood": 0.0, "num_bytes": 0}
    metrics = BitsPerByte().compute_metrics([window])
    assert metrics["loss"] == 2.0 and math.isnan(metrics["bits_per_byte"])


# ------------------------------------------------------------------------------------------------- evaluate


def test_evaluate_returns_a_json_serializable_dict(model, tokenizer, tmp_path):
    tasks = [
        HellaSwag(data="sample", limit=3),
        Lambada(data=write(tmp_path / "l.jsonl", {"text": "one two"}, {"text": "a b"})),
    ]
    model.train()
    try:
        result = evaluate(model, tokenizer, tasks)
        assert model.training
    finally:
        model.eval()
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert list(result["results"]) == ["hellaswag", "lambada"]
    assert result["results"]["hellaswag"]["n"] == 3
    assert "item_results" not in result


def test_invalid_tasks_tokenizers_and_items_are_refused_before_scoring(model, tokenizer):
    sample = HellaSwag(data="sample", limit=2)
    with pytest.raises(EvalError, match="unknown task 'helaswag'"):
        evaluate(model, tokenizer, ["helaswag"])
    with pytest.raises(EvalError, match="hellaswag is listed twice"):
        evaluate(model, tokenizer, [sample, sample])
    with pytest.raises(EvalError, match=r"prompts must be one or more of lecture, lm_eval, got \('x',\)"):
        evaluate(model, tokenizer, [HellaSwag(data="sample", prompts=("x",))])
    with pytest.raises(EvalError, match="has no tokenizer"):
        evaluate(model, None, [sample])
    with pytest.raises(EvalError, match=r"item 0 .* has \d+ tokens to score, .* context is 4"):
        sample.load(tokenizer, 4)
    with pytest.raises(EvalError, match="limit must be at least 1, got 0"):
        HellaSwag(data="sample", limit=0)


def test_new_task_needs_one_file(model, tokenizer, tmp_path, monkeypatch):
    """Run CONTRIBUTING.md's example."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    [code] = re.findall(r"<!-- example task -->\n```python\n(.*?)```", text, flags=re.DOTALL)
    module = types.ModuleType("eval.blimp.task")
    monkeypatch.setitem(sys.modules, "eval.blimp.task", module)  # dataclasses look it up
    exec(compile(code, "CONTRIBUTING.md", "exec"), vars(module))
    pairs = [("He sees it.", "He see it."), ("They go.", "They goes."), ("A cat sat.", "A cats sat.")]
    path = write(tmp_path / "blimp.jsonl", *({"sentence_good": good, "sentence_bad": bad} for good, bad in pairs))
    result = evaluate(model, tokenizer, [module.Task(data=path)])["results"]["blimp"]
    correct = [
        reference(model, [EOT, *tokenizer(good).input_ids], 1) > reference(model, [EOT, *tokenizer(bad).input_ids], 1)
        for good, bad in pairs
    ]
    assert (result["acc"], result["n"]) == (sum(correct) / 3, 3)
