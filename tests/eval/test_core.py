"""CORE: its prompts, few-shot examples and decisions, compared with a plain reimplementation, one prompt at a time."""

import json
import lzma
import math
import random
import zipfile

import numpy as np
import pytest
import torch

from eval import EvalError, evaluate
from eval.core.bundle import CORE
from eval.core.task import Task

BY_NAME = {task.name: task for task in CORE}
# A task with shots and the delimiter "\nAnswer: ", one without shots, one of each other kind.
NAMES = ("arc_easy", "copa", "winograd", "bigbench_operators", "lambada_openai")
WORDS = ["the", "cat", "sat", "on", "a", "red", "mat", "while", "rain", "fell", "over", "hills", "and", "nobody", "saw"]


def make_items(task, n):
    """Return n items of random words, with choices of different lengths and white space to strip."""
    rng = random.Random(task.name)

    def words(most):
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    if task.kind == "choices":
        gold = [rng.randrange(3) for _ in range(n)]
        return [{"query": words(5), "choices": [f"{i} {words(4)}" for i in "abc"], "gold": g} for g in gold]
    if task.kind == "schema":
        return [
            {"context_options": [f"{words(3)} {i}" for i in "ab"], "continuation": words(3), "gold": rng.randrange(2)}
            for _ in range(n)
        ]
    return [{"context": f" {words(4)} ", "continuation": words(2)} for _ in range(n)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Make a bundle with some of CORE's tasks, in the published folders."""
    folder = tmp_path_factory.mktemp("core") / "eval_bundle"
    for name in NAMES:
        task = BY_NAME[name]
        path = folder / "eval_data" / task.folder / f"{task.file}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(item) + "\n" for item in make_items(task, 14)))
    return folder


@pytest.fixture(scope="module")
def result(model, tokenizer, bundle):
    return evaluate(model, tokenizer, [Task(data=str(bundle))], keep_item_results=True)


def is_correct(model, tokenizer, task, items, index):
    """Decide an item as the protocol says, with a forward pass of its own for each prompt."""
    others = [item for i, item in enumerate(items) if i != index]
    shots = random.Random(1234 + index).sample(others, task.shots)
    item = items[index]

    def prompt(item, context, answer):
        context = context.strip() if task.kind == "completion" else context
        return f"{context}{task.delimiter}{answer}"

    def correct_answer(item):
        if task.kind == "choices":
            return prompt(item, item["query"], item["choices"][item["gold"]])
        if task.kind == "schema":
            return prompt(item, item["context_options"][item["gold"]], item["continuation"])
        return prompt(item, item["context"], item["continuation"])

    before = "".join(correct_answer(shot) + "\n\n" for shot in shots)
    if task.kind == "choices":
        texts = [before + prompt(item, item["query"], choice) for choice in item["choices"]]
    elif task.kind == "schema":
        texts = [before + prompt(item, context, item["continuation"]) for context in item["context_options"]]
    else:
        texts = [before + prompt(item, item["context"], item["continuation"])]
    tokens = [[50256, *tokenizer(text).input_ids] for text in texts]
    if task.kind == "completion":
        first = [1 + len(tokenizer((before + prompt(item, item["context"], "")).strip()).input_ids)]
    elif task.kind == "choices":
        [same] = {next(i for i, column in enumerate(zip(*tokens, strict=False)) if len(set(column)) > 1)}
        first = [same] * len(tokens)
    else:
        backwards = zip(*(ids[::-1] for ids in tokens), strict=False)
        same = next(i for i, column in enumerate(backwards) if len(set(column)) > 1)
        first = [len(ids) - same for ids in tokens]
    means = []
    for ids, start in zip(tokens, first, strict=True):
        kept = ids[-model.config.n_positions :]
        start -= len(ids) - len(kept)
        with torch.no_grad():
            log_probs = model(torch.tensor([kept])).logits[0, start - 1 : -1].double().log_softmax(-1)
        if task.kind == "completion":
            return log_probs.argmax(-1).tolist() == kept[start:], 0
        means.append(np.mean([row[token].item() for row, token in zip(log_probs, kept[start:], strict=True)]))
    return int(np.argmax(means)) == item["gold"], means


@pytest.mark.parametrize("name", NAMES)
def test_items_are_decided_as_one_prompt_at_a_time(name, model, tokenizer, result):
    task = BY_NAME[name]
    items = make_items(task, 14)
    random.Random(1337).shuffle(items)
    scored = [item for item in result["item_results"]["core"] if item["task"] == name]
    assert len(scored) == 14
    for index, item in enumerate(scored):
        expected, means = is_correct(model, tokenizer, task, items, index)
        assert item["is_correct"] == expected
        if task.kind != "completion":
            assert item["mean_log_likelihoods"] == pytest.approx(means, abs=1e-3)
    # Ten examples do not fit 128 tokens.
    assert any(item["tokens_truncated"] for item in scored) == (name == "arc_easy")
    accuracy = sum(item["is_correct"] for item in scored) / 14
    assert result["results"]["core"][name] == accuracy
    assert result["results"]["core"][f"{name}_stderr"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 13))


def test_part_of_the_tasks_gives_no_core(result):
    metrics = result["results"]["core"]
    assert "core" not in metrics and metrics["n"] == 14 * len(NAMES)
    chances = {task.name: task.chance for task in CORE}
    centered = [(metrics[name] - chances[name]) / (1 - chances[name]) for name in NAMES]
    assert metrics["partial"] == pytest.approx(sum(centered) / len(NAMES))
    source = result["tasks"]["core"]["data"]["source"]
    assert "5 of CORE's 22 tasks" in source and "jeopardy" in source and "copa" not in source


def test_core_is_the_mean_above_chance():
    results = [{"task": task.name, "is_correct": right} for task in CORE for right in (True, False, True, True)]
    metrics = Task().compute_metrics(results)
    assert metrics["core"] == pytest.approx(sum((0.75 - t.chance) / (1 - t.chance) for t in CORE) / 22)
    assert metrics["copa"] == 0.75 and metrics["n"] == 88
    assert metrics["core_stderr"] == pytest.approx(
        math.sqrt(sum((0.25 / (1 - t.chance)) ** 2 for t in CORE)) / 22  # sqrt(0.75 x 0.25 / 3) = 0.25
    )
    limited = Task(limit=4).compute_metrics(results)
    assert "core" not in limited and limited["partial"] == metrics["core"]


def test_zip_compressed_files_and_limits_give_the_same_items(bundle, model, tokenizer, tmp_path, result):
    with zipfile.ZipFile(tmp_path / "bundle.zip", "w") as archive:
        for path in bundle.rglob("*.jsonl"):
            archive.write(path, path.relative_to(bundle.parent))
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in bundle.rglob("*.jsonl"):
        (flat / f"{path.name}.xz").write_bytes(lzma.compress(path.read_bytes()))
    whole, zipped, few = (
        Task(data=str(path), limit=limit).load(tokenizer, 128)
        for path, limit in ((flat, None), (tmp_path / "bundle.zip", None), (flat, 3))
    )
    assert whole.data.sha256 == zipped.data.sha256 == result["tasks"]["core"]["data"]["sha256"]
    firsts = [item for n in range(len(NAMES)) for item in whole.items[14 * n : 14 * n + 3]]
    for item, first in zip(few.items, firsts, strict=True):
        assert item.reference == first.reference
        assert item.requests[0].context.tolist() == first.requests[0].context.tolist()  # the same examples before it


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "no such folder or .zip"),
        ([], r"0 items; each is preceded by 0 others"),
        ([{"query": "a", "choices": ["b", "c"], "gold": 2}], r"copa\.jsonl:1: gold must be between 0 and 1, got 2"),
        ([{"query": "a", "choices": ["b", "c"], "gold": "1"}], r"copa\.jsonl:1: gold must be between 0 and 1, got '1'"),
        ([{"query": "a", "choices": 5, "gold": 0}], r"copa\.jsonl:1: the answers must be a list, got 5"),
        ([{"query": 7, "choices": ["b", "c"], "gold": 0}], r"copa\.jsonl:1: query, .* must be text"),
        ([{"query": "a", "gold": 0}], r"copa\.jsonl:1: the field 'choices' is missing"),
        ([{"query": "a", "choices": ["b", "b"], "gold": 0}], "copa, item 0: an answer is empty, or two have"),
    ],
)
def test_mistakes_name_the_line(lines, message, tokenizer, tmp_path):
    folder = tmp_path / "bundle"
    if lines is not None:
        folder.mkdir()
        (folder / "copa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(Exception, match=message):
        Task(data=str(folder)).load(tokenizer, 128)


def test_data_is_needed_and_a_folder_without_core_is_named(tokenizer, tmp_path):
    with pytest.raises(EvalError, match=r"--data core=FOLDER_OR_ZIP; the bundle is https://"):
        Task().load(tokenizer, 128)
    with pytest.raises(EvalError, match="none of CORE's files is there"):
        Task(data=str(tmp_path)).load(tokenizer, 128)
