"""LAMBADA, bits per byte, the example of a new task, and `eval.evaluate` from Python; HellaSwag has its own file."""

import json
import math
import re
import sys
import types
from pathlib import Path

import evaluate as evaluate_library
import numpy as np
import pytest
import torch
from eval.bits_per_byte.compression import bits_per_byte
from eval.lambada.word_prediction import word_prediction
from eval.validation import validation_loss

from data.loader import validation_batches
from data.manifest import open_split
from data.shards import write_shard
from data.tokenizer import EOT
from eval import EvalError, evaluate
from eval.bits_per_byte.task import Task as BitsPerByte
from eval.hellaswag.task import Task as HellaSwag
from eval.lambada.task import Task as Lambada
from modeling_gpt2repro import GPT2ReproForCausalLM

ROOT = Path(__file__).parents[2]
TEXTS = ["It is the first text, and ein Mädchen liest it.", "The second: 42 words, <|endoftext|> is not one."]


@pytest.fixture(scope="module")
def model(tiny_gpt2):
    return GPT2ReproForCausalLM.from_gpt2(tiny_gpt2).eval()


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def reference(model, tokens, first):
    """Sum of ln p of tokens[first:], in float64."""
    with torch.no_grad():
        log_probs = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return sum(log_probs[t - 1, tokens[t]].item() for t in range(first, len(tokens)))


# ------------------------------------------------------------------------------------------------ LAMBADA


def test_both_kinds_of_passages_are_the_same(model, tokenizer, tmp_path):
    whole = write(tmp_path / "whole.jsonl", *({"text": text} for text in TEXTS))
    apart = write(
        tmp_path / "apart.jsonl",
        *({"context": context, "continuation": word} for context, word in (text.rsplit(" ", 1) for text in TEXTS)),
    )
    one, two = (evaluate(model, tokenizer, [Lambada(data=path)], keep_answers=True) for path in (whole, apart))
    assert one["results"] == two["results"]
    assert one["answers"] == two["answers"]
    sha256s = [result["tasks"]["lambada"]["data"]["sha256"] for result in (one, two)]
    assert sha256s[0] == sha256s[1]
    for text, answer in zip(TEXTS, one["answers"]["lambada"], strict=True):
        tokens = tokenizer(text, split_special_tokens=True).input_ids
        assert answer["word"] == text.split(" ")[-1]
        expected = reference(model, tokens, len(tokens) - answer["num_tokens"])
        assert answer["log_likelihood"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"context": "a"}, "the field 'continuation' is missing"),
        ([1], "[1] is no JSON object with the fields context and continuation"),
        ({"text": None}, "text must be text, got None"),
        ({"text": "word"}, "context is empty"),
        ({"text": "some word "}, "continuation is empty"),
        ({"context": "a", "continuation": 5}, "continuation must be text, got 5"),
    ],
)
def test_malformed_passages_are_named(tokenizer, tmp_path, record, message):
    path = write(tmp_path / "items.jsonl", {"text": "a good one"}, record)
    with pytest.raises(EvalError, match=re.escape(f"{path}:2: {message}")):
        Lambada(data=path).load(tokenizer)


def test_without_lambada_there_is_a_way_out(run_python):
    run = run_python(
        "-c",
        "from eval.lambada.task import Task\n"
        "from eval import EvalError\n"
        "try: Task().load(None)\n"
        "except EvalError as error: print(error)",
    )
    assert "EleutherAI/lambada_openai was not to be had (http" in run.stdout
    assert "name a local copy of LAMBADA with --data lambada=FILE" in run.stdout


PREDICTIONS = [
    {"log_likelihood": -1.0, "is_greedy": True},
    {"log_likelihood": -3.0, "is_greedy": False},
    {"log_likelihood": -2.0, "is_greedy": False},
]


def test_lambadas_arithmetic(evaluate_cache):
    expected = {
        **{"acc": 1 / 3, "acc_stderr": math.sqrt(1 / 3 * 2 / 3 / 2)},
        **{"perplexity": math.exp(2), "perplexity_stderr": math.exp(2) / math.sqrt(3), "n": 3},
    }
    assert word_prediction(PREDICTIONS) == pytest.approx(expected)
    metric = evaluate_library.load(str(ROOT / "eval" / "lambada"), keep_in_memory=True)
    assert metric.compute(predictions=PREDICTIONS) == pytest.approx(expected)
    assert math.isnan(word_prediction(PREDICTIONS[:1])["acc_stderr"])
    for predictions, message in (
        ([], "no predictions"),
        ([{"log_likelihood": 0.5, "is_greedy": True}], "passage 0: log_likelihood 0.5"),
        ([PREDICTIONS[0], {"log_likelihood": math.nan, "is_greedy": True}], "passage 1: log_likelihood nan"),
    ):
        with pytest.raises(ValueError, match=message):
            word_prediction(predictions)


# ------------------------------------------------------------------------------------------ bits per byte


@pytest.fixture(scope="module")
def shards(tmp_path_factory, tokenizer):
    """A folder of llm.c's kind, with a validation split of 257 tokens: the texts over and over, led by end-of-text."""
    folder = tmp_path_factory.mktemp("shards")
    tokens = [t for text in TEXTS for t in (EOT, *tokenizer(text, split_special_tokens=True).input_ids)]
    tokens = np.array((tokens * 20)[: 64 * 4 + 1], dtype=np.uint16)
    for split in ("train", "val"):
        write_shard(folder / f"texts_{split}_000000.bin", tokens)
    return folder, tokens


def test_a_stride_of_the_whole_context_is_trainings_validation_loss(model, tokenizer, shards):
    folder, _ = shards
    batches = validation_batches(open_split(folder, "val"), seq_len=128, batch_size=2, max_tokens=10**6)
    loss_sum, num_tokens = validation_loss(model, batches)
    result = evaluate(model, tokenizer, [BitsPerByte(data=str(folder), stride=128)])
    figures = result["results"]["bits_per_byte"]
    assert figures["num_tokens"] == num_tokens == 256
    assert figures["loss"] == pytest.approx(loss_sum / num_tokens, rel=1e-6)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    source = result["tasks"]["bits_per_byte"]["data"]["source"]
    assert source == f"{folder}, validation split, stride 128, all 2 windows"


def test_end_of_text_has_no_bytes(model, tokenizer, shards):
    """Loss over all tokens, bits over those that are text: by hand, in one window."""
    folder, tokens = shards
    task = BitsPerByte(data=str(folder), stride=128, limit=1)
    figures = evaluate(model, tokenizer, [task])["results"]["bits_per_byte"]
    inputs = torch.from_numpy(tokens[:129].astype(np.int64))
    with torch.no_grad():
        log_probs = model(inputs[None, :-1]).logits[0].double().log_softmax(-1).gather(1, inputs[1:, None])[:, 0]
    is_text = inputs[1:] != EOT
    assert 0 < is_text.sum() < 128
    num_bytes = len(tokenizer.decode(inputs[1:][is_text]).encode())
    assert figures["num_bytes"] == num_bytes
    assert figures["loss"] == pytest.approx(-log_probs.mean().item(), rel=1e-5)
    expected = -log_probs[is_text].sum().item() / math.log(2) / num_bytes
    assert figures["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_text_and_shards_of_it_are_the_same(model, tokenizer, tmp_path):
    text = " ".join(TEXTS[:1] * 10)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    tokens = np.array([EOT, *tokenizer(text).input_ids], dtype=np.uint16)
    for split in ("train", "val"):
        write_shard(tmp_path / f"a_{split}_000000.bin", tokens)
    of_text, of_shards = (
        evaluate(model, tokenizer, [BitsPerByte(data=str(data), stride=32)])["results"]["bits_per_byte"]
        for data in (tmp_path / "text.txt", tmp_path)
    )
    assert of_text == of_shards
    assert of_text["num_bytes"] == len(text.encode())


def test_documents_are_scored_by_themselves(model, tokenizer, tmp_path):
    path = write(tmp_path / "texts.jsonl", *({"text": text} for text in TEXTS))
    whole, first = (
        evaluate(model, tokenizer, [BitsPerByte(data=path, limit=limit)])["results"]["bits_per_byte"]
        for limit in (None, 1)
    )
    sums = [reference(model, [EOT, *tokenizer(t, split_special_tokens=True).input_ids], 1) for t in TEXTS]
    num_bytes = [len(text.encode()) for text in TEXTS]
    assert whole["bits_per_byte"] == pytest.approx(-sum(sums) / math.log(2) / sum(num_bytes), rel=1e-5)
    assert first["bits_per_byte"] == pytest.approx(-sums[0] / math.log(2) / num_bytes[0], rel=1e-5)
    assert whole["bits_per_byte"] == pytest.approx(bits_per_byte(sums, num_bytes), rel=1e-5)


def test_what_cannot_be_scored_is_said(tokenizer, shards, tmp_path):
    folder, _ = shards
    other = type("Tokenizer", (), {"__call__": lambda _, texts, **__: {"input_ids": [[1]] * len(texts)}})()
    other.bos_token_id = other.eos_token_id = None
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "text.txt").write_text("word")
    for data, by, message in (
        (folder, other, "shards hold GPT-2's tokens, and the model's tokenizer is another"),
        (tmp_path / "blank.txt", tokenizer, "blank.txt: no text in it"),
        (tmp_path / "text.txt", other, "neither a beginning- nor an end-of-text token"),
    ):
        with pytest.raises(EvalError, match=message):
            BitsPerByte(data=str(data)).load(by, 128)


def test_bits_per_bytes_arithmetic(evaluate_cache):
    assert bits_per_byte([-math.log(2) * 6, -math.log(2) * 2], [3, 1]) == pytest.approx(2.0)
    metric = evaluate_library.load(str(ROOT / "eval" / "bits_per_byte"), keep_in_memory=True)
    result = metric.compute(predictions=[-math.log(2) * 6, -math.log(2) * 2], references=["aü", "b"])
    assert result == {"bits_per_byte": pytest.approx(2.0), "num_bytes": 4, "n": 2}
    for arguments, message in (
        (([], []), "0 log-likelihoods for 0 texts"),
        (([-1.0], [1, 2]), "1 log-likelihoods for 2 texts"),
        (([-1.0, 0.1], [1, 2]), "text 1: log-likelihood 0.1"),
        (([-1.0], [0]), "the texts are empty"),
    ):
        with pytest.raises(ValueError, match=message):
            bits_per_byte(*arguments)


# ------------------------------------------------------------------------------------------------- evaluate


def test_evaluate_gives_a_plain_dict(model, tokenizer, tmp_path):
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
    assert "answers" not in result
    with pytest.raises(EvalError, match="no task 'helaswag'; did you mean 'hellaswag'"):
        evaluate(model, tokenizer, ["helaswag"])
    with pytest.raises(EvalError, match="hellaswag is there twice"):
        evaluate(model, tokenizer, [tasks[0], HellaSwag(data="sample", limit=2)])
    with pytest.raises(EvalError, match=r"hellaswag's prompts are one or more of lecture, lm_eval, got \('x',\)"):
        evaluate(model, tokenizer, [HellaSwag(data="sample", prompts=("x",))])
    with pytest.raises(EvalError, match=r"the model has no tokenizer \(got None\)"):
        evaluate(model, None, tasks)


def test_endings_that_do_not_fit_are_seen_before_scoring(tokenizer):
    with pytest.raises(EvalError, match=r"item 0 \(counted from 0\) has \d+ tokens to score, .* holds 4: score it on"):
        HellaSwag(data="sample").load(tokenizer, 4)


def test_a_new_task_is_one_file(model, tokenizer, tmp_path, monkeypatch):
    """CONTRIBUTING.md's example, as it stands there."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    [code] = re.findall(r"<!-- example task -->\n```python\n(.*?)```", text, flags=re.DOTALL)
    module = types.ModuleType("eval.blimp.task")
    monkeypatch.setitem(sys.modules, "eval.blimp.task", module)  # dataclasses look it up
    exec(compile(code, "CONTRIBUTING.md", "exec"), vars(module))
    pairs = [("He sees it.", "He see it."), ("They go.", "They goes."), ("A cat sat.", "A cats sat.")]
    path = write(tmp_path / "blimp.jsonl", *({"sentence_good": good, "sentence_bad": bad} for good, bad in pairs))
    result = evaluate(model, tokenizer, [module.Task(data=path)])["results"]["blimp"]
    right = [
        reference(model, [EOT, *tokenizer(good).input_ids], 1) > reference(model, [EOT, *tokenizer(bad).input_ids], 1)
        for good, bad in pairs
    ]
    assert (result["acc"], result["n"]) == (sum(right) / 3, 3)
