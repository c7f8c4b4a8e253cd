"""Test all tasks but HellaSwag, which has its own file; the example of a new task; and `eval.evaluate`."""

import json
import math
import re
import sys
import types

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from tiny_run import ROOT

from data.loader import validation_batches
from data.manifest import open_split
from data.shards import write_shard
from data.tokenizer import EOT
from eval import EvalError, evaluate, items
from eval.bits_per_byte.task import Task as BitsPerByte
from eval.blimp.__main__ import main as print_paradigms
from eval.blimp.task import PARADIGMS, PHENOMENA
from eval.blimp.task import Task as Blimp
from eval.during_training import validation_loss
from eval.hellaswag.task import Task as HellaSwag
from eval.items import HubUnavailableError
from eval.lambada.task import Task as Lambada
from eval.task import score_items
from eval.wikitext.task import Task as WikiText
from eval.wikitext.task import rows_of, split_pages

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

    monkeypatch.setattr(items, "hub_records", fail)
    for task in (Lambada(), Blimp(), WikiText()):
        with pytest.raises(EvalError, match=f"the network is down.*--data {task.name}=FILE"):
            task.load(tokenizer)


def test_error_while_items_are_downloaded_is_that_they_are_not_available(tokenizer, monkeypatch):
    """hf_xet's and the HTTP library's errors are of classes of their own."""

    class ServerDisconnected(Exception):
        pass

    def fail(*_, **__):
        raise ServerDisconnected("the server hung up")

    monkeypatch.setattr(items, "hub_error", lambda: None)
    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(EvalError, match=r"the server hung up.*--data lambada=FILE"):
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


# -------------------------------------------------------------------------------------------------- BLiMP

PAIRS = [
    ("Who did she see?", "Who did she saw?", "wh_island", "island_effects"),
    ("They go home.", "They goes home.", "wh_island", "island_effects"),
    ("The same is here.", "The same is here.", "wh_island", "island_effects"),
    ("A cat sat.", "A cats sat.", "animate_subject_trans", "s-selection"),
    ("He doesn't like it.", "He don't like it.", "causative", "argument_structure"),
    ("Ann's dog ran.", "Anns dog ran.", "mine", "possession"),
]


def write_pairs(path, pairs=PAIRS):
    names = ("sentence_good", "sentence_bad", "UID", "linguistics_term")
    return write(path, *(dict(zip(names, pair, strict=True)) for pair in pairs))


def test_blimp_log_likelihoods_with_and_without_start_token(model, tokenizer, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl")
    result = evaluate(model, tokenizer, [Blimp(data=data)], keep_item_results=True)
    counts, correct = {}, {}
    for *sentences, paradigm, _ in PAIRS:
        index = counts[paradigm] = counts.get(paradigm, -1) + 1
        [scores] = [r for r in result["item_results"]["blimp"] if (r["paradigm"], r["pair"]) == (paradigm, index)]
        with_start = [reference(model, [EOT, *tokenizer(f" {text}").input_ids], 1) for text in sentences]
        without_start = [reference(model, tokenizer(text).input_ids, 1) for text in sentences]
        assert scores["log_likelihoods"] == pytest.approx(with_start, abs=1e-3)
        assert scores["no_start_log_likelihoods"] == pytest.approx(without_start, abs=1e-3)
        correct.setdefault(paradigm, []).append(with_start[0] >= with_start[1])
    metrics, accuracies = result["results"]["blimp"], {name: np.mean(values) for name, values in correct.items()}
    assert metrics["acc"] == pytest.approx(np.mean(list(accuracies.values())))
    assert {name: metrics[name] for name in correct} == pytest.approx(accuracies)


def test_blimp_metrics_match_values_computed_by_hand():
    def results(paradigm, phenomenon, *is_correct):
        pairs = [
            {"log_likelihoods": [-1, -2] if yes else [-2, -1], "no_start_log_likelihoods": [-3, -2]}
            for yes in is_correct
        ]
        return [{"paradigm": paradigm, "phenomenon": phenomenon, **pair} for pair in pairs]

    one, two = results("a", "x", True, True, False), results("b", "x", True, False)
    tie = {"log_likelihoods": [-1, -1], "no_start_log_likelihoods": [-1, -1]}
    three = [{"paradigm": "c", "phenomenon": "y", **tie}] * 2
    metrics = Blimp().compute_metrics([*one, *two, *three])
    errors = [math.sqrt(2 / 3 * 1 / 3 / 2), math.sqrt(1 / 2 * 1 / 2)]
    assert metrics == pytest.approx(
        {
            **{"acc": (2 / 3 + 1 / 2 + 1) / 3, "acc_stderr": math.hypot(*errors) / 3},
            **{"acc_no_start": 1 / 3, "acc_no_start_stderr": 0.0},
            **{"x": (2 / 3 + 1 / 2) / 2, "x_stderr": math.hypot(*errors) / 2, "y": 1.0, "y_stderr": 0.0},
            **{"a": 2 / 3, "a_stderr": errors[0], "b": 1 / 2, "b_stderr": errors[1], "c": 1.0, "c_stderr": 0.0, "n": 7},
        }
    )
    assert math.isnan(Blimp().compute_metrics(one[:1])["acc_stderr"])


def test_blimp_limit_takes_paradigms_in_turn_and_published_phenomena(tokenizer, tmp_path):
    items = Blimp(data=write_pairs(tmp_path / "pairs.jsonl"), limit=5).load(tokenizer).items
    origins = [tuple(item.reference.values()) for item in items]
    assert origins == [
        ("animate_subject_trans", "argument_structure", 0),
        ("causative", "argument_structure", 0),
        ("mine", "possession", 0),
        ("wh_island", "island_effects", 0),
        ("wh_island", "island_effects", 1),
    ]


def test_blimp_reads_all_subsets_of_the_hub(tokenizer, monkeypatch):
    def one_record(dataset, split, name):
        record = {"sentence_good": "It is so.", "sentence_bad": "It are so.", "UID": name, "linguistics_term": "x"}
        return [(record, f"{dataset} {split} {name}")], f"{dataset} ({split})"

    monkeypatch.setattr(items, "hub_records", one_record)
    loaded = Blimp().load(tokenizer)
    assert [item.reference["paradigm"] for item in loaded.items] == sorted(PARADIGMS)
    assert loaded.data.description == "nyu-mll/blimp (train), all 67 items"


def test_blimp_pair_of_equal_sentences_is_a_tie(model, tokenizer, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl", PAIRS[2:3])
    result = evaluate(model, tokenizer, [Blimp(data=data)], keep_item_results=True)
    good, bad = result["item_results"]["blimp"][0]["log_likelihoods"]
    assert good == bad and result["results"]["blimp"]["acc"] == 1.0


def test_blimp_malformed_pair_is_named(tokenizer, tmp_path):
    for pair, message in (
        (("A.", "B c.", "mine", "x"), None),
        (("A", "B c.", "mine", "x"), "mine, pair 0: a sentence has only one token"),
        (("A b.", "B c.", "mine", ""), "pairs.jsonl:1: linguistics_term is empty"),
    ):
        task = Blimp(data=write_pairs(tmp_path / "pairs.jsonl", [pair]))
        if message is None:
            task.load(tokenizer)
        else:
            with pytest.raises(EvalError, match=message):
                task.load(tokenizer)


def test_blimp_has_67_paradigms_and_prints_them_next_to_the_published_results(tmp_path, capsys):
    assert (len(PARADIGMS), len(PHENOMENA)) == (67, 12)
    result = {
        "results": {"blimp": {"acc": 0.5, "acc_stderr": None, "ellipsis": 0.25, "wh_island": 0.75}},
        "tasks": {"blimp": {"data": {"source": "pairs"}}},
        "model": {"name": "a model"},
    }
    path = tmp_path / "results.json"
    path.write_text(json.dumps(result))
    assert print_paradigms([str(path)]) == 0
    first, _, *lines = capsys.readouterr().out.splitlines()
    assert first == "a model, pairs" and len(lines) == 2 + 1 + 12 + 67
    assert "published (not reproduced here)" in lines[0]
    # The overall and phenomenon figures of the authors' own summary.
    assert "| **overall** | 0.5000 |  | 0.8302 |" in lines
    assert "| **ellipsis** | 0.2500 |  | 0.8935 |" in lines
    assert "| **argument_structure** |  |  | 0.8178 |" in lines
    assert sum(line.startswith("| wh_island | 0.7500 |") for line in lines) == 1
    path.write_text("{}")
    assert print_paradigms([str(path)]) == 2
    assert "has no results of blimp" in capsys.readouterr().err


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


# ------------------------------------------------------------------------------------------------ WikiText

RAW = (
    " \n = Ann = \n \n Ann wrote 1 @,@ 205 pages . \n \n = = Life = = \n \n She <unk> . \n \n"
    " = The Lake = \n \n The lake froze , and people walked across it . \n \n"
)
# The rows of the dataset `wikitext`, and the pages of the dataset `wikitext_document_level`.
ROWS = ["", " = Ann = \n", "", " Ann wrote 1 @,@ 205 pages . \n", "", " = = Life = = \n", "", " She <unk> . \n", ""]
ROWS += [" = The Lake = \n", "", " The lake froze , and people walked across it . \n", ""]
PAGES = [
    " = Ann = \n \n Ann wrote 1 @,@ 205 pages . \n \n = = Life = = \n \n She <unk> . \n ",
    " = The Lake = \n \n The lake froze , and people walked across it . \n \n",
]


def test_wikitext_forms_of_the_data_give_the_same_pages_and_rows(tokenizer, tmp_path):
    (tmp_path / "wiki.test.raw").write_text(RAW, encoding="utf-8")
    write(tmp_path / "pages.jsonl", *({"page": page} for page in PAGES))
    write(tmp_path / "rows.jsonl", *({"text": row} for row in ROWS))
    parquet.write_table(pyarrow.table({"text": ROWS}), tmp_path / "rows.parquet")
    parquet.write_table(pyarrow.table({"page": PAGES}), tmp_path / "pages.parquet")
    loaded = [WikiText(data=str(path)).load(tokenizer, 16) for path in sorted(tmp_path.iterdir())]
    assert len({task.data.sha256 for task in loaded}) == 1 and len(loaded) == 5
    assert split_pages(RAW) == PAGES
    assert rows_of(PAGES) == ROWS
    assert loaded[0].data.description.endswith("pages.jsonl, all 2 pages")


@pytest.mark.parametrize(("protocol", "stride"), [("sliding", 8), ("disjoint", 16)])
def test_wikitext_windows_match_transformers_page_on_perplexity(tiny_gpt2, tokenizer, tmp_path, protocol, stride):
    """Run the windows of https://huggingface.co/docs/transformers/perplexity with the model's own loss."""
    max_length = 16
    task = WikiText(data=write(tmp_path / "rows.jsonl", *({"text": row} for row in ROWS)))
    items = [item for item in task.load(tokenizer, max_length).items if item.reference["protocol"] == protocol]
    results = score_items(task, tiny_gpt2, items)
    ids = tokenizer("\n\n".join(ROWS), return_tensors="pt").input_ids
    expected, previous_end = [], 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + max_length, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : previous_end - end] = -100
        labels[:, 0] = -100  # has no logit
        if num_tokens := (labels != -100).sum().item():
            with torch.no_grad():
                loss = tiny_gpt2.eval()(ids[:, begin:end], labels=labels).loss.item()
            expected.append((num_tokens, -loss * num_tokens))
        previous_end = end
        if end == ids.shape[1]:
            break
    assert [result["num_tokens"] for result in results] == [n for n, _ in expected]
    assert [result["log_likelihood"] for result in results] == pytest.approx([x for _, x in expected], rel=1e-4)
    metrics = task.compute_metrics(results)
    mean = sum(x for _, x in expected) / sum(n for n, _ in expected)
    assert metrics == pytest.approx({f"{protocol}_perplexity": math.exp(-mean), "n": 0}, rel=1e-4)


def test_wikitext_metrics_match_values_computed_by_hand():
    results = [
        {"protocol": "lm_eval", "log_likelihood": -8.0, "num_tokens": 5, "num_words": 3, "num_bytes": 12},
        {"protocol": "lm_eval", "log_likelihood": -4.0, "num_tokens": 2, "num_words": 1, "num_bytes": 4},
        {"protocol": "sliding", "log_likelihood": -6.0, "num_tokens": 3},
        {"protocol": "disjoint", "log_likelihood": -5.0, "num_tokens": 2},
    ]
    assert WikiText().compute_metrics(results) == pytest.approx(
        {
            **{"word_perplexity": math.exp(12 / 4), "byte_perplexity": math.exp(12 / 16)},
            **{"bits_per_byte": 12 / 16 / math.log(2), "sliding_perplexity": math.exp(2)},
            **{"disjoint_perplexity": math.exp(2.5), "n": 2},
        }
    )


def test_wikitext_data_and_settings_that_do_not_work_are_refused(tokenizer, tmp_path):
    (tmp_path / "latin.raw").write_bytes("Mädchen".encode("latin-1"))
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    for data, message in (
        (write(tmp_path / "a.jsonl", {"page": "a b"}, {"page": ""}), "a.jsonl:2: page is empty"),
        (write(tmp_path / "b.jsonl", {"document": "a b"}), "the field 'page' is missing"),
        (write(tmp_path / "c.jsonl", {"text": "a b"}, {"text": None}), "c.jsonl:2: text must be text"),
        (write(tmp_path / "d.jsonl", {"text": ""}), "d.jsonl has fewer than two tokens"),
        (tmp_path / "latin.raw", "latin.raw: neither UTF-8 text nor"),
        (tmp_path / "broken.parquet", "broken.parquet: neither UTF-8 text nor"),
        (tmp_path / "missing.raw", "missing.raw.*no such file"),
    ):
        with pytest.raises(EvalError, match=message):
            WikiText(data=str(data)).load(tokenizer, 16)


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
    module = types.ModuleType("eval.copa.task")
    monkeypatch.setitem(sys.modules, "eval.copa.task", module)  # dataclasses look it up
    exec(compile(code, "CONTRIBUTING.md", "exec"), vars(module))
    questions = [
        ("The glass fell.", "effect", "It broke.", "He slept.", 0),
        ("She ran home.", "cause", "It was dry.", "It was raining.", 1),
        ("The dog barked.", "cause", "It was fed.", "It saw a cat.", 1),
    ]
    fields = ("premise", "question", "choice1", "choice2", "label")
    path = write(tmp_path / "copa.jsonl", *(dict(zip(fields, question, strict=True)) for question in questions))
    result = evaluate(model, tokenizer, [module.Task(data=path)], keep_item_results=True)
    contexts = ["The glass fell therefore", "She ran home because", "The dog barked because"]
    num_correct = 0
    for context, question, item_result in zip(contexts, questions, result["item_results"]["copa"], strict=True):
        num_tokens = len(tokenizer(context).input_ids)
        texts = [f"{context} {choice[0].lower()}{choice[1:]}" for choice in question[2:4]]
        expected = [reference(model, tokenizer(text).input_ids, num_tokens) for text in texts]
        assert item_result["log_likelihoods"] == pytest.approx(expected, abs=1e-3)
        num_correct += (expected[1] > expected[0]) == question[4]
    assert (result["results"]["copa"]["acc"], result["results"]["copa"]["n"]) == (num_correct / 3, 3)
