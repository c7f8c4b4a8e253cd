"""Test the evaluations that train.py runs: shares of several processes, stop requests, diverged models, samples."""

import copy
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eval import EvalError, during_training
from eval.during_training import (
    TrainingEvaluation,
    check_prompts,
    load_task,
    prompts_of,
    sample_texts,
    validation_loss,
)
from eval.items import DataInfo
from eval.scoring import Request
from eval.task import BaseTask, Item

NUM_ITEMS = 5
PROMPTS = ["Hello, I", "The"]


@pytest.fixture(scope="module")
def batches():
    """Make three batches of [2, 16], the last one with two documents per row."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(50257, (3, 2, 17), generator=generator)
    positions = torch.cat([torch.arange(10), torch.arange(6)]).expand(2, -1)
    return [(rows[:, :-1], rows[:, 1:], positions if i == 2 else None) for i, rows in enumerate(tokens)]


@pytest.fixture(scope="module")
def hellaswag(tokenizer):
    return load_task("hellaswag", "sample", NUM_ITEMS, tokenizer, 128)


class Parity(BaseTask):
    """Is the log-likelihood of a token higher after token 1 than after token 2? Kinds of items come one by one."""

    name = "parity"
    version = 1
    metrics = {"loss": "of the tokens", "acc": "after 1"}  # noqa: RUF012
    main_metric = "acc"

    def read(self, tokenizer, max_length):
        items = [Item([Request([start], [[i]]) for start in (1, 2)], {"index": i}) for i in range(10, 17)[: self.limit]]
        return items, DataInfo(description="numbers", sha256="")

    def process_item(self, item, scores):
        return item.reference | {"values": [score.log_likelihood for [score] in scores]}

    def compute_metrics(self, item_results):
        values = [result["values"] for result in item_results]
        assert [r["index"] for r in item_results] == sorted(r["index"] for r in item_results)
        n = len(values)
        return {"acc": sum(a > b for a, b in values) / n, "acc_stderr": 0.1, "loss": -sum(map(sum, values)) / n, "n": n}


@pytest.fixture
def parity(monkeypatch, tokenizer):
    task_class = during_training.task_class
    monkeypatch.setattr(during_training, "task_class", lambda name: Parity if name == "parity" else task_class(name))
    return load_task("parity", None, None, tokenizer, 128)


def stop_after(reads):
    """Return a function that is true after it was called so many times."""
    calls = itertools.count()
    return lambda: next(calls) >= reads


@pytest.fixture
def make_evaluation(batches, hellaswag, tokenizer):
    def make(**changes):
        settings = {
            "val_batches": {"a": lambda batch_size: iter(batches)},
            "tasks": [(hellaswag, 10)],
            "tokenizer": tokenizer,
        }
        settings |= {"prompts": PROMPTS, "sample_tokens": 4, "seed": 1, "should_stop": stop_after(math.inf)}
        evaluation = TrainingEvaluation(**settings | changes)
        return lambda *models, step=0, is_last=False: evaluation.run(*models, 4, step=step, is_last=is_last)

    return make


def test_validation_loss_matches_float64_logits(model, batches):
    double = copy.deepcopy(model).double()
    expected = 0.0
    for inputs, targets, position_ids in batches:
        with torch.no_grad():
            log_probs = double(inputs, position_ids=position_ids).logits.log_softmax(-1)
        expected -= log_probs.gather(-1, targets[..., None]).sum().item()
    loss_sum, num_tokens = validation_loss(model, batches)
    assert num_tokens == 3 * 2 * 16
    assert loss_sum == pytest.approx(expected, rel=1e-5)


def test_result_has_loss_metrics_and_samples(model, batches, hellaswag, make_evaluation, tokenizer):
    run = make_evaluation()
    result = run(model, model)
    loss_sum, num_tokens = validation_loss(model, batches)
    assert result.val_loss == loss_sum / num_tokens
    assert result.hellaswag["n"] == NUM_ITEMS
    assert result.hellaswag["is_sample"] is True
    assert result.hellaswag["num_truncated"] == 0
    assert 0 < result.hellaswag_seconds < result.seconds
    assert result.samples == sample_texts(model, tokenizer, PROMPTS, num_tokens=4, seed=1)
    again = run(model, torch.nn.DataParallel(model))  # reads the batches again; a wrapped loss model
    assert (again.val_loss, again.hellaswag) == (result.val_loss, result.hellaswag)

    assert result.val_losses is None

    folders = {"x": lambda _: batches[:1], "y": lambda _: batches[1:]}
    mixed = make_evaluation(tasks=[], prompts=[], val_batches=folders, val_weights=[0.75, 0.25])
    mixed = mixed(model, model)
    x, y = (validation_loss(model, part) for part in (batches[:1], batches[1:]))
    assert mixed.val_losses == {"x": x[0] / x[1], "y": y[0] / y[1]}
    assert mixed.val_loss == 0.75 * mixed.val_losses["x"] + 0.25 * mixed.val_losses["y"]

    without = make_evaluation(tasks=[], prompts=[])(model, model)
    assert (without.val_loss, without.hellaswag, without.hellaswag_seconds) == (result.val_loss, None, 0.0)
    assert without.samples == []


def test_two_processes_give_the_result_of_one(model, batches, hellaswag, parity, make_evaluation, monkeypatch):
    tasks = [(hellaswag, 10), (parity, 10)]
    expected = make_evaluation(tasks=tasks)(model, model)
    shares, results = [], []
    for rank in (1, 0):  # rank 0 runs last and has both shares
        state = SimpleNamespace(process_index=rank, num_processes=2, is_main_process=rank == 0)
        monkeypatch.setattr(during_training, "PartialState", lambda state=state: state)
        monkeypatch.setattr(during_training, "gather_object", lambda share: shares.insert(0, *share) or shares)
        val_batches = {"a": lambda _, rank=rank: batches[rank::2]}
        results.append(make_evaluation(tasks=tasks, val_batches=val_batches)(model, model))
    assert [[len(results) for results in share.results.values()] for share in shares] == [[3, 4], [2, 3]]
    assert results[1].val_loss == pytest.approx(expected.val_loss, rel=1e-6)
    assert results[1].hellaswag == pytest.approx(expected.hellaswag)
    assert results[1].scores["parity"] == pytest.approx(expected.scores["parity"])
    assert [*expected.scores["parity"]][:2] == ["acc", "loss"] and expected.scores["parity"]["n"] == 7
    assert results[1].samples == expected.samples
    assert results[0].samples == []  # not the main process

    # A task that fails on either process has no scores on both.
    other = shares[1]
    shares[:] = [other._replace(results=other.results | {"parity": during_training._Failure("it broke", False)})]
    result = make_evaluation(tasks=tasks, val_batches={"a": lambda _: batches[::2]}, prompts=[])(model, model)
    assert result.scores == {} and result.hellaswag == pytest.approx(expected.hellaswag)

    # A stop request to either process ends the evaluation on both.
    shares[:] = [other._replace(is_stop_requested=True)]
    assert make_evaluation(val_batches={"a": lambda _: batches[::2]})(model, model) is None


@pytest.mark.parametrize(("after", "num_forwards"), [(0, 1), (2, 3), (3, 4), (4, 4)])
def test_stop_request_ends_the_evaluation_after_the_current_batch(model, make_evaluation, after, num_forwards):
    """`should_stop` is called after each of three validation batches, after the batch of items, and at the end."""
    forwards = []
    hook = model.transformer.register_forward_hook(lambda *_: forwards.append(None))
    try:
        assert make_evaluation(should_stop=stop_after(after))(model, model) is None
    finally:
        hook.remove()
    assert len(forwards) == num_forwards


def test_diverged_model_has_a_loss_but_no_metrics_or_samples(model, make_evaluation, capsys):
    diverged = copy.deepcopy(model)
    torch.nn.init.constant_(diverged.transformer.ln_f.weight, float("nan"))
    result = make_evaluation()(diverged, diverged)
    assert math.isnan(result.val_loss)
    assert (result.hellaswag, result.samples) == (None, [])
    assert capsys.readouterr().out.startswith("warning: hellaswag was not scored: the model's log-likelihoods are not")


def test_tasks_are_scored_at_multiples_of_their_intervals_and_after_the_last_step(
    model, parity, make_evaluation, batches
):
    run = make_evaluation(tasks=[(parity, 20)], prompts=[], val_batches={"a": lambda _: batches[:1]})
    scored = [bool(run(model, model, step=step, is_last=step == 30).scores) for step in (0, 10, 20, 30)]
    assert scored == [True, False, True, True]


@pytest.mark.parametrize("method", ["process_item", "compute_metrics"])
def test_failing_task_is_reported_once_and_left_out(
    model, batches, hellaswag, parity, make_evaluation, monkeypatch, capsys, method
):
    def fail(*_):
        raise ZeroDivisionError("of\nthe task")

    monkeypatch.setattr(Parity, method, fail)
    run = make_evaluation(tasks=[(parity, 10), (hellaswag, 10)], val_batches={"a": lambda _: batches[:1]})
    for step in (0, 10):
        result = run(model, model, step=step)
        assert result.scores == result.score_seconds == {}
        assert result.hellaswag["n"] == NUM_ITEMS and len(result.samples) == 2
    warning = (
        "warning: parity was not scored: ZeroDivisionError: of the task; it is left out until the run is resumed\n"
    )
    assert capsys.readouterr().out == warning


def test_share_of_the_items_is_spread_over_all(tokenizer, parity):
    loaded = load_task("parity", None, "50%", tokenizer, 128)
    assert [item.reference["index"] for item in loaded.items] == [10, 12, 14]
    assert loaded.task.limit == 3 and loaded.data.description == "numbers, 50% of them"


def test_samples_depend_on_the_seed_and_leave_the_random_state(model, tokenizer):
    state = torch.get_rng_state()
    first, again, other = (sample_texts(model, tokenizer, PROMPTS, num_tokens=8, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert [text.startswith(prompt) for text, prompt in zip(first, PROMPTS, strict=True)] == [True, True]
    assert torch.equal(torch.get_rng_state(), state)


def test_prompts_must_have_tokens_and_fit_the_context(tokenizer):
    check_prompts(tokenizer, PROMPTS, num_tokens=7, n_positions=10)  # "Hello, I" has 3 tokens
    for prompts, message in ((["Hello, I"], "'Hello, I' and eval.sample_tokens=8"), ([""], "'' has no tokens")):
        with pytest.raises(EvalError, match=message):
            check_prompts(tokenizer, prompts, num_tokens=8, n_positions=10)


def test_prompts_are_words_of_the_validation_text(tokenizer):
    words = [f"word{i}" for i in range(60)]
    tokens = np.array(tokenizer(" ".join(words)).input_ids)
    first, second = prompts_of([tokens[:3], tokens], tokenizer, max_tokens=40)
    assert first == "word1 word2 word3 word4 word5"
    assert second in " ".join(words[25:]) and len(second.split()) == 5
    assert prompts_of([tokens], tokenizer, max_tokens=3) == []
    [chinese, _] = prompts_of([np.array(tokenizer("春眠不觉晓处处闻啼鸟" * 20).input_ids)], tokenizer, max_tokens=64)
    assert 0 < len(chinese) <= 12 and chinese.strip("�") in "春眠不觉晓处处闻啼鸟" * 20
