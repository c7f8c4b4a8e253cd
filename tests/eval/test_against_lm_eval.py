"""Compare metrics and log-likelihoods with those of the package lm-eval, the reference, on the same model."""

import copy
import importlib.util
import json
import random
import sys
from pathlib import Path

import lm_eval
import numpy as np
import pytest
import yaml
from lm_eval.models.huggingface import HFLM

from eval import EvalError, evaluate
from eval.bits_per_byte.task import Task as BitsPerByte
from eval.blimp.task import Task as Blimp
from eval.evaluator import load_tasks
from eval.hellaswag.task import SAMPLE, load_items
from eval.hellaswag.task import Task as HellaSwag
from eval.lambada.task import Task as Lambada
from eval.lm_eval_bridge import LmEvalTask
from eval.wikitext.task import Task as WikiText
from eval.wikitext.task import detokenize

TASKS = Path(lm_eval.__file__).parent / "tasks"
TASKS_HERE = {"hellaswag": HellaSwag, "lambada": Lambada, "blimp": Blimp, "wikitext": WikiText}
# BLiMP pairs by paradigm: contractions, equal sentences, odd spaces.
BLIMP = {
    "wh_island": [
        ("Who did Ann say that Bob saw?", "Who did Ann say that Bob saw him?"),
        ("The same is here.", "The same is here."),
        ("What can't they do?", "What they can't do?"),
    ],
    "causative": [("Tina isn't breaking the cup.", "Tina isn't vanishing the cup."), ("Ich  sehe.", "Ich sähe")],
}
# WikiText's pages: separated marks, section titles, unknown words, a page of several windows.
PAGES = [
    ' = Ann <unk> = \n \n Ann ( born 3 May 1914 ) wrote 1 @,@ 205 pages @-@ long books ; " a 2 @.@ 5 ° N " . \n \n',
    " = The 's Lake = \n \n = = Name = = \n \n It 's the birds ' lake : [ sic ] , he said . \n \n"
    + " = = = Älter = = = \n \n"
    + " The lake froze in winter , and people walked across it to ' Town ' . \n" * 15,
]
# A task of lm-eval with items from a file.
LOCAL = """
include: {original}
task: {name}
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{{split}: '{path}'}}}}
training_split: null
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write difficult items: with tags, doubled and missing spaces, no ctx_b, too long for the model."""
    folder = tmp_path_factory.mktemp("lm_eval_tasks")
    records = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()[:12]]
    records[0] |= {"ctx_a": "[header] How to sit [title] Find a chair. [step] Look  at it.", "ctx_b": ""}
    records[0]["endings"] = ["Sit. [substeps] Sit  down.", " [title] Then stand up.", "[step] Lie. ", "Ein Mädchen "]
    records[1] |= {"ctx_a": "word " * 150, "ctx_b": "SHE goes"}
    records[2]["endings"] = ["no", "yes", "it's so", "it's  so"]
    (folder / "hellaswag.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    passages = [
        'He said, "I know', "One two\n\nthree four five", "word " * 200 + "end", "a tab\tand a don't stop", "She is 42"
    ]  # fmt: skip
    (folder / "lambada.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in passages))
    blimp = [
        {"sentence_good": good, "sentence_bad": bad, "UID": paradigm, "linguistics_term": "island_effects"}
        for paradigm, pairs in BLIMP.items()
        for good, bad in pairs
    ]
    (folder / "blimp.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in blimp))
    (folder / "wikitext.jsonl").write_text("".join(json.dumps({"page": page}) + "\n" for page in PAGES))
    tasks = [("hellaswag", "hellaswag/hellaswag", "validation"), ("lambada", "lambada/lambada_openai", "test")]
    tasks.append(("wikitext", "wikitext/wikitext", "test"))
    for paradigm in BLIMP:
        own = [json.dumps(pair) + "\n" for pair in blimp if pair["UID"] == paradigm]
        (folder / f"{paradigm}.jsonl").write_text("".join(own))
        tasks.append((paradigm, f"blimp/{paradigm}", "train"))
    for name, original, split in tasks:
        names = {"original": TASKS / f"{original}.yaml", "name": f"{name}_here", "path": folder / f"{name}.jsonl"}
        (folder / f"{name}_here.yaml").write_text(LOCAL.format(split=split, **names))
    with (folder / "wikitext_here.yaml").open("a") as file:
        file.write("validation_split: null\n")
    group = yaml.safe_load((TASKS / "blimp/_blimp.yaml").read_text())
    group |= {"group": "blimp_here", "task": [f"{paradigm}_here" for paradigm in BLIMP]}
    (folder / "blimp_here.yaml").write_text(yaml.safe_dump(group))
    return folder


@pytest.fixture(scope="module")
def expected(model, tokenizer, folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        manager, _ = LmEvalTask(task=f"{folder}/hellaswag_here").find()
        return lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3),
            tasks=["hellaswag_here", "lambada_here", "blimp_here", "wikitext_here"],
            task_manager=manager,
            bootstrap_iters=0,
        )


@pytest.fixture(scope="module")
def ours(model, tokenizer, folder):
    tasks = [task(data=str(folder / f"{name}.jsonl")) for name, task in TASKS_HERE.items()]
    return evaluate(model, tokenizer, tasks, keep_item_results=True)


def samples_of(expected, task):
    return sorted(expected["samples"][f"{task}_here"], key=lambda sample: sample["doc_id"])


def test_hellaswag_log_likelihoods_match_lm_eval(ours, expected):
    item_results = ours["item_results"]["hellaswag"]
    samples = samples_of(expected, "hellaswag")
    assert len(item_results) == len(samples) == 12
    assert item_results[1]["tokens_truncated"] > 0
    for result, sample in zip(item_results, samples, strict=True):
        reference = np.array([float(value) for value, _ in sample["filtered_resps"]])
        values = np.array(result["lm_eval_log_likelihoods"])
        assert values == pytest.approx(reference, abs=1e-3)
        lengths = np.array([len(choice) for choice in sample["doc"]["choices"]])
        assert result["lm_eval_num_characters"] == lengths.tolist()
        for divisor in (1, lengths):
            second, best = np.sort(reference / divisor)[-2:]
            if best - second > 1e-3:
                assert (values / divisor).argmax() == (reference / divisor).argmax()


def test_metrics_match_lm_eval(ours, expected):
    hellaswag, lambada = ours["results"]["hellaswag"], ours["results"]["lambada"]
    reference = expected["results"]["hellaswag_here"]
    assert hellaswag["lm_eval_acc"] == reference["acc,none"]
    assert hellaswag["lm_eval_acc_norm"] == reference["acc_norm,none"]
    reference = expected["results"]["lambada_here"]
    assert lambada["acc"] == reference["acc,none"]
    assert lambada["perplexity"] == pytest.approx(reference["perplexity,none"], rel=1e-4)


def test_lambada_log_likelihoods_match_lm_eval(ours, expected):
    item_results = ours["item_results"]["lambada"]
    assert item_results[2]["tokens_truncated"] > 0
    for result, sample in zip(item_results, samples_of(expected, "lambada"), strict=True):
        [[value, is_greedy]] = sample["filtered_resps"]
        assert result["log_likelihood"] == pytest.approx(float(value), abs=1e-3)
        assert result["is_greedy"] == (str(is_greedy) == "True")


def test_blimp_log_likelihoods_and_group_match_lm_eval(ours, expected):
    metrics, num_pairs = ours["results"]["blimp"], 0
    for name in BLIMP:
        own = [result for result in ours["item_results"]["blimp"] if result["paradigm"] == name]
        for result, sample in zip(own, samples_of(expected, name), strict=True):
            reference = [float(value) for value, _ in sample["filtered_resps"]]
            assert result["log_likelihoods"] == pytest.approx(reference, abs=1e-3)
            num_pairs += 1
        assert metrics[name] == expected["results"][f"{name}_here"]["acc,none"]
    assert num_pairs == metrics["n"] == 5
    assert metrics["acc"] == expected["results"]["blimp_here"]["acc,none"]


def test_blimp_standard_error_is_that_of_lm_evals_groups():
    from lm_eval.api.metrics import mean_stderr, pooled_sample_stderr

    correct = {"a": [1, 1, 0, 1], "b": [1, 0, 0, 1], "c": [1, 1, 1, 1]}
    results = [
        {"paradigm": name, "phenomenon": "x", "log_likelihoods": [x, 0.5], "no_start_log_likelihoods": [0, 0]}
        for name, values in correct.items()
        for x in values
    ]
    errors = [mean_stderr(values) for values in correct.values()]
    metrics = Blimp().compute_metrics(results)
    assert metrics["acc_stderr"] == pytest.approx(pooled_sample_stderr(errors, [4, 4, 4]))
    assert metrics["a_stderr"] == pytest.approx(errors[0])


def test_wikitext_pages_and_metrics_match_lm_eval(ours, expected):
    pages = [result for result in ours["item_results"]["wikitext"] if result["protocol"] == "lm_eval"]
    assert len(pages) == 2 and pages[1]["num_tokens"] > 2 * 128
    for page, sample in zip(pages, samples_of(expected, "wikitext"), strict=True):
        [value] = sample["filtered_resps"]
        assert page["log_likelihood"] == pytest.approx(float(value), abs=1e-2)
        _, num_words = sample["word_perplexity"]
        _, num_bytes = sample["byte_perplexity"]
        assert (page["num_words"], page["num_bytes"]) == (num_words, num_bytes)
    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        reference = expected["results"]["wikitext_here"][f"{metric},none"]
        assert ours["results"]["wikitext"][metric] == pytest.approx(reference, rel=1e-5)


def test_wikitext_detokenizer_matches_lm_eval():
    spec = importlib.util.spec_from_file_location("lm_eval_wikitext", TASKS / "wikitext/preprocess_wikitext.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rng = random.Random(0)
    pieces = [*" \nN()[]{}=°:;.!?,'\"\t\u00a0", "a", "is", "s'", "'s", "@-@", "@,@", "@.@", "/'", "5/", *"   =="]
    texts = [*PAGES, *("".join(rng.choices(pieces, k=rng.randint(1, 40))) for _ in range(5_000))]
    for text in texts:
        assert detokenize(text) == module.wikitext_detokenizer({"page": text})


def test_tokenizer_that_adds_a_bos_token_matches_lm_eval(model, tokenizer, folder):
    """Llama's tokenizer starts every text with its own token; lm-eval's contexts have it, and so do ours."""
    from lm_eval.api.instance import Instance
    from tokenizers.processors import TemplateProcessing

    llama_like = copy.deepcopy(tokenizer)
    bos = ("<|endoftext|>", tokenizer.eos_token_id)
    template = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[bos])
    llama_like.backend_tokenizer.post_processor = template
    records = [json.loads(line) for line in (folder / "hellaswag.jsonl").read_text().splitlines()][3:6]
    path = folder / "few.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    result = evaluate(model, llama_like, [HellaSwag(data=str(path))], keep_item_results=True)
    items, _ = load_items(path)
    backend = HFLM(pretrained=model, tokenizer=llama_like, batch_size=4)
    pairs = [(item.lm_eval_query, f" {ending}") for item in items for ending in item.lm_eval_endings]
    reference = backend.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    values = [x for item in result["item_results"]["hellaswag"] for x in item["lm_eval_log_likelihoods"]]
    assert values == pytest.approx([value for value, _ in reference], abs=1e-3)


def test_bridge_returns_lm_evals_metrics_and_restores_training_mode(model, tokenizer, folder, expected):
    name = f"lm-eval:{folder}/hellaswag_here"
    loaded = load_tasks([name], tokenizer, model.config)
    model.train()
    try:
        result = evaluate(model, tokenizer, loaded)
        assert model.training
    finally:
        model.eval()
    reference = expected["results"]["hellaswag_here"]
    metrics = result["results"][name]
    assert (metrics["acc"], metrics["acc_norm"]) == (reference["acc,none"], reference["acc_norm,none"])
    assert metrics["n"] == 12
    assert metrics["acc_stderr"] > 0
    assert result["tasks"][name]["figures"].keys() == {"acc", "acc_norm"}


def test_bridge_refuses_unknown_tasks_folders_and_a_missing_package(model, tokenizer, folder, monkeypatch):
    for name, message in (
        (f"{folder}/hellaswagg", "lm-eval .* has no task 'hellaswagg'"),
        ("no/such/folder/task", "the folder 'no/such/folder' does not exist"),
    ):
        with pytest.raises(EvalError, match=message):
            load_tasks([f"lm-eval:{name}"], tokenizer, model.config)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EvalError, match=r"cannot be imported .*; pip install 'lm-eval\[hf\]>=0.4.13'"):
        load_tasks(["lm-eval:piqa"], tokenizer, model.config)


@pytest.mark.parametrize("stride", [128, 50, 1])
def test_windows_match_lm_eval(model, tokenizer, tmp_path, stride):
    """Compare every window, and with a stride of the full context the sum from lm-eval's backend."""
    from lm_eval.api.instance import Instance
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    text = "The quick brown fox, it is said, jumps over the lazy dog; and ein Mädchen sees it.\n" * (
        14 if stride > 1 else 7
    )
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    task = BitsPerByte(data=str(tmp_path / "text.txt"), stride=stride)
    items = task.load(tokenizer, 128).items
    windows = get_rolling_token_windows(
        tokenizer(text).input_ids, tokenizer.eos_token_id, max_seq_len=128, context_len=128 - stride + 1
    )
    windows = [make_disjoint_window(window) for window in windows]
    assert [(list(c), list(k)) for item in items for c, [k] in item.requests] == windows
    if stride == 128:
        assert len(windows) > 2
        backend = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
        [expected] = backend.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
        results = evaluate(model, tokenizer, [task])["results"]["bits_per_byte"]
        assert -results["loss"] * results["num_tokens"] == pytest.approx(expected, abs=1e-2)
        assert results["num_bytes"] == len(text.encode())
        assert results["bits_per_byte"] == pytest.approx(-expected / np.log(2) / len(text.encode()), rel=1e-5)
