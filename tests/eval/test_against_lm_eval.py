"""Our figures and log-likelihoods beside those of the package lm-eval: the reference, run on the same model."""

import copy
import json
from pathlib import Path

import lm_eval
import numpy as np
import pytest
from lm_eval.models.huggingface import HFLM

from eval import EvalError, evaluate, lm_eval_bridge
from eval.bits_per_byte.task import Task as BitsPerByte
from eval.evaluator import prepare, score
from eval.hellaswag.items import SAMPLE, load_items
from eval.hellaswag.task import Task as HellaSwag
from eval.lambada.task import Task as Lambada
from eval.lm_eval_bridge import LmEvalTask
from modeling_gpt2repro import GPT2ReproForCausalLM

TASKS = Path(lm_eval.__file__).parent / "tasks"
# lm-eval's own tasks, with items from a file.
LOCAL = """
include: {original}
task: {name}
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{{split}: '{path}'}}}}
training_split: null
"""


@pytest.fixture(scope="module")
def model(tiny_gpt2):
    return GPT2ReproForCausalLM.from_gpt2(tiny_gpt2).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Items as they come: with tags, doubled and missing spaces, no ctx_b, too long for the model."""
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
    for name, split in (("hellaswag", "validation"), ("lambada", "test")):
        original = TASKS / ("hellaswag/hellaswag.yaml" if name == "hellaswag" else "lambada/lambada_openai.yaml")
        path = folder / f"{name}.jsonl"
        text = LOCAL.format(original=original, name=f"{name}_here", split=split, path=path)
        (folder / f"{name}_here.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def theirs(model, tokenizer, folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        manager, _ = lm_eval_bridge.check_lm_eval(LmEvalTask(f"{folder}/hellaswag_here"))
        return lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3),
            tasks=["hellaswag_here", "lambada_here"],
            task_manager=manager,
            bootstrap_iters=0,
        )


@pytest.fixture(scope="module")
def ours(model, tokenizer, folder):
    tasks = [HellaSwag(data=str(folder / "hellaswag.jsonl")), Lambada(data=str(folder / "lambada.jsonl"))]
    return evaluate(model, tokenizer, tasks, keep_answers=True)


def samples(theirs, task):
    return sorted(theirs["samples"][f"{task}_here"], key=lambda sample: sample["doc_id"])


def test_hellaswags_log_likelihoods_are_lm_evals(ours, theirs):
    answers = ours["answers"]["hellaswag"]
    assert len(answers) == len(samples(theirs, "hellaswag")) == 12
    assert answers[1]["tokens_cut"] > 0
    for answer, sample in zip(answers, samples(theirs, "hellaswag"), strict=True):
        expected = np.array([float(value) for value, _ in sample["filtered_resps"]])
        found = np.array(answer["lm_eval_log_likelihoods"])
        assert found == pytest.approx(expected, abs=1e-3)
        lengths = np.array([len(choice) for choice in sample["doc"]["choices"]])
        assert answer["lm_eval_num_characters"] == lengths.tolist()
        for per in (1, lengths):
            second, best = np.sort(expected / per)[-2:]
            if best - second > 1e-3:
                assert (found / per).argmax() == (expected / per).argmax()


def test_the_figures_are_lm_evals(ours, theirs):
    hellaswag, lambada = ours["results"]["hellaswag"], ours["results"]["lambada"]
    expected = theirs["results"]["hellaswag_here"]
    assert hellaswag["lm_eval_acc"] == expected["acc,none"]
    assert hellaswag["lm_eval_acc_norm"] == expected["acc_norm,none"]
    expected = theirs["results"]["lambada_here"]
    assert lambada["acc"] == expected["acc,none"]
    assert lambada["perplexity"] == pytest.approx(expected["perplexity,none"], rel=1e-4)


def test_lambadas_log_likelihoods_are_lm_evals(ours, theirs):
    answers = ours["answers"]["lambada"]
    assert answers[2]["tokens_cut"] > 0
    for answer, sample in zip(answers, samples(theirs, "lambada"), strict=True):
        [[value, is_greedy]] = sample["filtered_resps"]
        assert answer["log_likelihood"] == pytest.approx(float(value), abs=1e-3)
        assert answer["is_greedy"] == (str(is_greedy) == "True")


def test_a_tokenizer_that_begins_texts_by_itself(model, tokenizer, folder):
    """As Llama's does: lm-eval's contexts begin with its token, and so do ours."""
    from lm_eval.api.instance import Instance
    from tokenizers.processors import TemplateProcessing

    llamas = copy.deepcopy(tokenizer)
    begin = ("<|endoftext|>", tokenizer.eos_token_id)
    template = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[begin])
    llamas.backend_tokenizer.post_processor = template
    records = [json.loads(line) for line in (folder / "hellaswag.jsonl").read_text().splitlines()][3:6]
    (folder / "few.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    answers = evaluate(model, llamas, [HellaSwag(data=str(folder / "few.jsonl"))], keep_answers=True)["answers"]
    items, _ = load_items(str(folder / "few.jsonl"))
    backend = HFLM(pretrained=model, tokenizer=llamas, batch_size=4)
    pairs = [(item.lm_eval_query, f" {ending}") for item in items for ending in item.lm_eval_endings]
    expected = backend.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    found = [value for answer in answers["hellaswag"] for value in answer["lm_eval_log_likelihoods"]]
    assert found == pytest.approx([value for value, _ in expected], abs=1e-3)


def test_the_bridge_gives_lm_evals_figures(model, tokenizer, folder, theirs):
    name = f"lm-eval:{folder}/hellaswag_here"
    prepared = prepare([name], tokenizer, model.config)
    model.train()
    try:
        result = score(model, tokenizer, prepared)
        assert model.training
    finally:
        model.eval()
    expected = theirs["results"]["hellaswag_here"]
    found = result["results"][name]
    assert (found["acc"], found["acc_norm"], found["n"]) == (expected["acc,none"], expected["acc_norm,none"], 12)
    assert found["acc_stderr"] > 0
    assert result["tasks"][name]["figures"].keys() == {"acc", "acc_norm"}


def test_the_bridge_says_what_is_wrong(model, tokenizer, folder, monkeypatch):
    for name, message in (
        (f"{folder}/hellaswagg", "lm-eval .* has no task 'hellaswagg'"),
        ("no/such/folder/task", "there is no folder 'no/such/folder'"),
    ):
        with pytest.raises(EvalError, match=message):
            prepare([f"lm-eval:{name}"], tokenizer, model.config)
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(EvalError, match=r"cannot be imported .*; pip install 'lm-eval\[hf\]>=0.4.13'"):
        prepare(["lm-eval:piqa"], tokenizer, model.config)


@pytest.mark.parametrize("stride", [128, 50, 1])
def test_windows_are_lm_evals(model, tokenizer, tmp_path, stride):
    """Every window, and with a stride of the whole context the sum that lm-eval's backend gives."""
    from lm_eval.api.instance import Instance
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    text = "The quick brown fox, it is said, jumps over the lazy dog; and ein Mädchen sees it.\n" * (
        14 if stride > 1 else 7
    )
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    task = BitsPerByte(data=str(tmp_path / "text.txt"), stride=stride)
    items, _ = task.load(tokenizer, 128)
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
