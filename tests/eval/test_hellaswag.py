"""Test HellaSwag: its items, malformed items, and scores against the lecture's way of scoring."""

import copy
import gzip
import json
import lzma
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
import torch

from common import hub
from common.errors import UserError
from eval.hellaswag.task import SAMPLE, HellaSwagItem, Task, load_items
from eval.task import interleave_ranks, score_items

LOAD_ITEMS = ("-m", "tests.eval.load_hellaswag")
GOOD = {
    "activity_label": "Rain",
    "ctx_a": "A man opens an umbrella",
    "ctx_b": "because",
    "ctx": "A man opens an umbrella because",
    "endings": ["it rains.", "b.", "c.", "d."],
    "label": 0,
}
BARE = {name: GOOD[name] for name in ("ctx", "endings", "label")}


def jsonl(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def write(path, text):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# ---------------------------------------------------------------------------------------------- the sample


def test_sample_has_hellaswags_fields_and_balanced_labels():
    records = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    assert [record["ind"] for record in records] == list(range(40))
    assert Counter(record["label"] for record in records) == {0: 10, 1: 10, 2: 10, 3: 10}
    assert len({record["ctx"] for record in records}) == 40
    for record in records:
        assert list(record) == ["ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings", "label"]
        assert record["ctx"] == f"{record['ctx_a']} {record['ctx_b']}".strip()
        assert len(set(record["endings"])) == 4


def test_sample_labels_cannot_be_guessed_from_length_or_position():
    """Chance is 10 of 40."""
    items, _ = load_items("sample")
    by_rule = {
        "longest": [max(range(4), key=lambda i, item=item: len(item.endings[i])) for item in items],
        "shortest": [min(range(4), key=lambda i, item=item: len(item.endings[i])) for item in items],
        "round robin": [index % 4 for index in range(40)],
        "previous label": [0, *(item.label for item in items[:-1])],
    }
    for rule, choices in by_rule.items():
        num_correct = sum(choice == item.label for choice, item in zip(choices, items, strict=True))
        assert num_correct <= 17, rule


# ------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        *(("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress), ("a.jsonl.xz", lzma.compress)),
        ("a.jsonl.zst", lambda content: pyarrow.compress(content, codec="zstd", asbytes=True)),
    ],
)
def test_items_are_read_from_plain_and_compressed_files(tmp_path, name, pack):
    records = [GOOD | {"label": "2", "more": 1}, GOOD | {"ctx": "Ein Mädchen", "ctx_b": ""}]
    path = write(tmp_path / name, pack(("\ufeff" + jsonl(*records) + "\n").encode()))
    items, source = load_items(str(path))
    assert items == [
        HellaSwagItem("Rain", GOOD["ctx_a"], "because", GOOD["ctx"], tuple(GOOD["endings"]), 2),
        HellaSwagItem("Rain", GOOD["ctx_a"], "", "Ein Mädchen", tuple(GOOD["endings"]), 0),
    ]
    assert source.description == f"{path}, all 2 items"
    assert not source.is_sample


def test_sha256_depends_on_the_loaded_items_only(tmp_path):
    first, second = GOOD, GOOD | {"label": 3}
    a, source_a = load_items(write(tmp_path / "a.jsonl", jsonl(first, second)), 1)
    b, source_b = load_items(write(tmp_path / "b.jsonl", jsonl(first | {"ind": 5, "label": "0"})))
    _, source_c = load_items(write(tmp_path / "c.jsonl", jsonl(second)))
    assert a == b
    assert source_a.description.endswith("the first 1 of 2 items")
    assert source_a.sha256 == source_b.sha256 != source_c.sha256


BAD_LINES = {
    "not JSON": ("{", "not JSON"),
    "two objects": (jsonl(GOOD).strip() * 2, "not JSON"),
    "not UTF-8": (b'{"ctx": "\xff"}', "not UTF-8 at byte 9"),
    "nested too deep": ("[" * 100_000, "not JSON"),
    "a list": ("[1, 2]", "[1, 2] is not a JSON object"),
    **{
        f"no {field}": (
            jsonl({name: value for name, value in GOOD.items() if name != field}),
            f"the field '{field}' is missing; an item has the fields activity_label, ctx_a, ctx_b, ctx, endings, label",
        )
        for field in GOOD
    },
    "no activity": (jsonl(GOOD | {"activity_label": " "}), "activity_label is empty"),
    "ctx_b a number": (jsonl(GOOD | {"ctx_b": 5}), "ctx_b must be text, got 5"),
    "half a character": (jsonl(GOOD | {"ctx": "a \ud800"}), "ctx is not valid Unicode"),
    "endings a text": (jsonl(GOOD | {"endings": "abcd"}), "list of exactly 4 texts, got 'abcd'"),
    "five endings": (jsonl(GOOD | {"endings": ["a"] * 5}), "exactly 4 texts, got 5 of them"),
    "an ending null": (jsonl(GOOD | {"endings": ["a", "b", None, "d"]}), "ending 2 must be text, got None"),
    "an ending empty": (jsonl(GOOD | {"endings": ["a", "b", "c", ""]}), "ending 3 is empty"),
    "an ending all tags": (
        jsonl(GOOD | {"endings": ["a", "b", "[header]", "d"]}),
        "ending 2 without its [tags] is empty",
    ),
    **{  # "" is HellaSwag's test split
        f"label {label!r}": (
            jsonl(GOOD | {"label": label}),
            f"label must be 0, 1, 2 or 3 (the correct ending), got {label!r}",
        )
        for label in (4, -1, "one", "", 1.0, True, [1])
    },
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_malformed_line_is_named(tmp_path, kind):
    line, message = BAD_LINES[kind]
    line = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path / "items.jsonl", jsonl(GOOD, GOOD).encode() + line.rstrip(b"\n") + b"\n")
    with pytest.raises(UserError) as raised:
        load_items(path, 1)  # lines past the limit are checked too
    assert str(raised.value).startswith(f"{path}:3: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "no such file; give 'hub', 'sample', or"),
        ("items.csv", "a,b", "cannot read files ending in '.csv'; give"),
        ("empty.jsonl", "\n \n", "has no items"),
        ("not.jsonl.gz", "plain", "damaged or truncated"),
        ("not.jsonl.xz", "plain", "damaged or truncated"),
        ("cut.jsonl.gz", gzip.compress(jsonl(GOOD).encode() * 99, mtime=0)[:-20], "damaged or truncated"),
        ("cut.jsonl.xz", lzma.compress(jsonl(GOOD).encode() * 99)[:-20], "damaged or truncated"),
    ],
)
def test_unreadable_file_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises(UserError) as raised:
        load_items(str(path))
    assert str(path) in str(raised.value)
    assert message in str(raised.value)


# ------------------------------------------------------------------------------------------------ the Hub


@pytest.mark.parametrize(
    ("env", "reason"),
    [({}, "http://127.0.0.1:9 cannot be reached"), ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set")],
)
def test_sample_replaces_the_hub_quickly_without_a_network(run_python, env, reason):
    result = json.loads(run_python(*LOAD_ITEMS, **env).stdout)
    assert result["is_sample"]
    assert result["n"] == 40
    assert result["description"].startswith("SAMPLE of 40 items written for this project, NOT HellaSwag")
    assert f"Rowan/hellaswag is not available: {reason}" in result["description"]
    assert result["seconds"] < 10  # the Hub's clients would retry for 23


def test_hub_dataset_is_loaded_and_cached(run_python, local_hub, tmp_path):
    import datasets

    # The Hub's schema: labels are text, and it has more splits and fields than are read.
    records = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()][:30]
    rows = datasets.Dataset.from_list([record | {"label": str(record["label"])} for record in records])
    rows.to_parquet(tmp_path / "rows.parquet")
    unlabelled = datasets.Dataset.from_list([record | {"label": ""} for record in records])
    unlabelled.to_parquet(tmp_path / "unlabelled.parquet")
    files = {
        "README.md": b"---\nlicense: mit\n---\n",
        "validation-00000-of-00001.parquet": (tmp_path / "rows.parquet").read_bytes(),
        "test-00000-of-00001.parquet": (tmp_path / "unlabelled.parquet").read_bytes(),
    }
    address = local_hub({"datasets/Rowan/hellaswag": files})
    online, unreachable, offline = (
        json.loads(run_python(*LOAD_ITEMS, **env).stdout)
        for env in ({"HF_ENDPOINT": address}, {}, {"HF_HUB_OFFLINE": "1"})
    )
    for result in (online, unreachable, offline):
        assert not result["is_sample"], result["description"]
        assert result["description"] == "Rowan/hellaswag (validation), all 30 items"
        assert result["n"] == 30
        assert result["label"] == records[-1]["label"]
    assert unreachable["seconds"] < 10
    path = write(tmp_path / "same.jsonl", jsonl(*records))
    assert load_items(path)[1].sha256 == online["sha256"] == offline["sha256"]


def test_missing_hub_dataset_is_named(run_python, local_hub):
    result = json.loads(run_python(*LOAD_ITEMS, HF_ENDPOINT=local_hub({})).stdout)
    assert result["is_sample"]
    assert "is not available: Dataset 'Rowan/hellaswag' doesn't exist" in result["description"]


def test_hub_probe_times_out(monkeypatch):
    import huggingface_hub

    silent = SimpleNamespace(head=lambda *_, **__: time.sleep(5))
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: silent)
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.1)
    start = time.perf_counter()
    assert "did not answer in 0.1 seconds" in hub.hub_error.__wrapped__()
    assert time.perf_counter() - start < 3


# ------------------------------------------------------------------------------------------------ scoring


def score_records(model, tokenizer, records, *, prompts=("lecture", "lm_eval"), path, **options):
    """Score a file of these records: (task, item results)."""
    loaded = Task(data=str(write(path / "records.jsonl", jsonl(*records))), prompts=prompts).load(tokenizer)
    return loaded.task, score_items(loaded.task, model, loaded.items, **options)


def sample(number=40):
    return [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()[:number]]


def lecture_predictions(model, tokenizer, items):
    """
    Score as the lecture does (Karpathy, "Let's reproduce GPT-2").

    Four rows padded to one length, a mask over the ending, cross entropy of all tokens shifted by one, summed and
    averaged where the mask is 1.
    """
    by_sum, by_mean = [], []
    for item in items:
        context = tokenizer.encode(item["ctx"])
        endings = [tokenizer.encode(" " + ending) for ending in item["endings"]]
        tokens = torch.zeros(4, len(context) + max(map(len, endings)), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, ending in enumerate(endings):
            tokens[row, : len(context) + len(ending)] = torch.tensor(context + ending)
            mask[row, len(context) : len(context) + len(ending)] = 1
        with torch.no_grad():
            logits = model.eval()(tokens).logits
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        sums = (losses * mask[:, 1:]).sum(1)
        by_sum.append(sums)
        by_mean.append(sums / mask[:, 1:].sum(1))
    return torch.stack(by_sum), torch.stack(by_mean)


def test_scores_match_the_lectures(tiny_gpt2, tokenizer, tmp_path):
    items = sample(12)
    task, item_results = score_records(tiny_gpt2, tokenizer, items, path=tmp_path)
    sums = torch.tensor([result["lecture_log_likelihoods"] for result in item_results])
    means = sums / torch.tensor([result["lecture_num_tokens"] for result in item_results])
    lecture_sums, lecture_means = lecture_predictions(tiny_gpt2, tokenizer, items)
    torch.testing.assert_close(-sums, lecture_sums, atol=1e-3, rtol=0)
    torch.testing.assert_close(-means, lecture_means, atol=1e-4, rtol=0)

    metrics = task.aggregate(item_results)
    labels = torch.tensor([item["label"] for item in items])
    assert metrics["acc"] == pytest.approx((lecture_sums.argmin(1) == labels).double().mean().item())
    assert metrics["acc_norm"] == pytest.approx((lecture_means.argmin(1) == labels).double().mean().item())
    assert metrics["n"] == 12


def test_batch_order_ranks_padding_and_dtype_change_scores_by_rounding_only(
    tiny_gpt2, tokenizer, tmp_path, monkeypatch
):
    """An item's choice may change only if its best two endings are closer than the rounding."""
    items = sample()
    task, reference = score_records(tiny_gpt2, tokenizer, items, path=tmp_path)

    def assert_same(item_results, tolerance=1e-3):
        for ours, expected in zip(item_results, reference, strict=True):
            assert ours["label"] == expected["label"]
            for prompt, length in (("lecture", "num_tokens"), ("lm_eval", "num_characters")):
                a, b = (np.array(result[f"{prompt}_log_likelihoods"]) for result in (ours, expected))
                assert a == pytest.approx(b, abs=tolerance)
                for divisor in (1, np.array(expected[f"{prompt}_{length}"])):
                    second, best = np.sort(b / divisor)[-2:]
                    if best - second > 2 * tolerance / np.min(divisor):
                        assert (a / divisor).argmax() == (b / divisor).argmax()

    assert_same(score_records(tiny_gpt2, tokenizer, items, path=tmp_path, tokens_per_batch=64)[1])
    assert_same(score_records(tiny_gpt2, tokenizer, items[::-1], path=tmp_path)[1][::-1])
    shares = [score_records(tiny_gpt2, tokenizer, items[rank::3], path=tmp_path)[1] for rank in range(3)]
    assert_same(interleave_ranks(shares))
    monkeypatch.setattr(tokenizer, "padding_side", "left")
    assert_same(score_records(tiny_gpt2, tokenizer, items, path=tmp_path)[1])
    half = copy.deepcopy(tiny_gpt2).bfloat16()
    rounded = score_records(half, tokenizer, items, path=tmp_path)[1]
    assert_same(rounded, tolerance=0.5)  # the sums are around -100
    full_metrics, rounded_metrics = task.aggregate(reference), task.aggregate(rounded)
    for metric in task.metrics:
        assert rounded_metrics[metric] == pytest.approx(full_metrics[metric], abs=0.05)  # two of 40 items
    assert score_items(task, tiny_gpt2, []) == []


class UnigramModel(torch.nn.Module):
    """A model with two probabilities: one for some tokens and one for all others, whatever came before."""

    def __init__(self, likely):
        super().__init__()
        logits = torch.zeros(50257)
        logits[likely] = 10.0
        self.logits = torch.nn.Parameter(logits)
        self.config = SimpleNamespace(vocab_size=50257, max_position_embeddings=64)

    def forward(self, input_ids, logits_to_keep, **_):
        return SimpleNamespace(logits=self.logits.expand(len(input_ids), logits_to_keep, -1))


def test_metrics_of_a_model_with_known_choices(tokenizer, tmp_path):
    model = UnigramModel(tokenizer.encode(" yes"))
    items = [
        BARE | {"ctx": "Is it so? yes yes", "endings": ["no", "yes", "no no", "maybe"], "label": 1},  # correct by both
        BARE | {"ctx": "Is it so?", "endings": ["no", "yes", "no no", "maybe"], "label": 0},  # wrong by both
        # Forty likely tokens are together less probable than one unlikely token, but more probable per token.
        BARE | {"ctx": "Is it so?", "endings": ["yes " * 39 + "yes", "no", "no no", "no no no"], "label": 0},
    ]
    task, item_results = score_records(model, tokenizer, items, prompts=("lecture",), path=tmp_path)
    assert item_results[0]["lecture_num_tokens"] == [1, 1, 2, 1]
    metrics = task.aggregate(item_results)
    assert metrics["acc"] == pytest.approx(1 / 3)
    assert metrics["acc_norm"] == pytest.approx(2 / 3)
    assert "lm_eval_acc" not in metrics


def test_special_tokens_in_items_are_encoded_as_text(tokenizer, tmp_path):
    item = BARE | {"ctx": "He types <|endoftext|> and", "endings": ["<|endoftext|>", "a", "b", "c"]}
    _, [result] = score_records(UnigramModel([0]), tokenizer, [item], prompts=("lecture",), path=tmp_path)
    assert result["lecture_num_tokens"] == [7, 1, 1, 1]  # " <", "|", "end", "of", "text", "|", ">"
