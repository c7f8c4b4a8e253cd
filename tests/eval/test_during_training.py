"""Test the evaluations that train.py runs: shares of several processes, stop requests, diverged models, samples."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from eval import EvalError, during_training
from eval.during_training import TrainingEvaluation, check_prompts, sample_texts, validation_loss
from eval.hellaswag.task import LECTURE
from eval.hellaswag.task import Task as HellaSwag

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
    return HellaSwag(data="sample", limit=NUM_ITEMS, prompts=(LECTURE,)).load(tokenizer, 128)


class Stop:
    """A stop request that comes after `is_requested` was read so many times."""

    def __init__(self, after=math.inf):
        self.after = after

    @property
    def is_requested(self):
        self.after -= 1
        return self.after < 0


@pytest.fixture
def make_evaluation(batches, hellaswag, tokenizer):
    def make(**changes):
        settings = {
            "val_batches": {"a": lambda batch_size: iter(batches)},
            "hellaswag": hellaswag,
            "tokenizer": tokenizer,
        }
        settings |= {"prompts": PROMPTS, "sample_tokens": 4, "seed": 1, "stop": Stop()}
        return TrainingEvaluation(**settings | changes)

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
    evaluation = make_evaluation()
    result = evaluation.run(model, model, 4)
    loss_sum, num_tokens = validation_loss(model, batches)
    assert result.val_loss == loss_sum / num_tokens
    assert result.hellaswag["n"] == NUM_ITEMS
    assert result.hellaswag["is_sample"] is True
    assert result.hellaswag["num_truncated"] == 0
    assert 0 < result.hellaswag_seconds < result.seconds
    assert result.samples == sample_texts(model, tokenizer, PROMPTS, num_tokens=4, seed=1)
    again = evaluation.run(model, torch.nn.DataParallel(model), 4)  # reads the batches again; a wrapped loss model
    assert (again.val_loss, again.hellaswag) == (result.val_loss, result.hellaswag)

    assert result.val_losses is None

    folders = {"x": lambda _: batches[:1], "y": lambda _: batches[1:]}
    mixed = make_evaluation(hellaswag=None, prompts=[], val_batches=folders, val_weights=[0.75, 0.25])
    mixed = mixed.run(model, model, 4)
    x, y = (validation_loss(model, part) for part in (batches[:1], batches[1:]))
    assert mixed.val_losses == {"x": x[0] / x[1], "y": y[0] / y[1]}
    assert mixed.val_loss == 0.75 * mixed.val_losses["x"] + 0.25 * mixed.val_losses["y"]

    without = make_evaluation(hellaswag=None, prompts=[]).run(model, model, 4)
    assert (without.val_loss, without.hellaswag, without.hellaswag_seconds) == (result.val_loss, None, 0.0)
    assert without.samples == []


def test_two_processes_give_the_result_of_one(model, batches, make_evaluation, monkeypatch):
    expected = make_evaluation().run(model, model, 4)
    shares, results = [], []
    for rank in (1, 0):  # rank 0 runs last and has both shares
        state = SimpleNamespace(process_index=rank, num_processes=2, is_main_process=rank == 0)
        monkeypatch.setattr(during_training, "PartialState", lambda state=state: state)
        monkeypatch.setattr(during_training, "gather_object", lambda share: shares.insert(0, *share) or shares)
        results.append(make_evaluation(val_batches={"a": lambda _, rank=rank: batches[rank::2]}).run(model, model, 4))
    assert [len(share.item_results) for share in shares] == [3, 2]
    assert results[1].val_loss == pytest.approx(expected.val_loss, rel=1e-6)
    assert results[1].hellaswag == pytest.approx(expected.hellaswag)
    assert results[1].samples == expected.samples
    assert results[0].samples == []  # not the main process

    # A stop request to either process ends the evaluation on both.
    shares[:] = [shares[1]._replace(is_stop_requested=True)]
    assert make_evaluation(val_batches={"a": lambda _: batches[::2]}).run(model, model, 4) is None


@pytest.mark.parametrize(("after", "num_forwards"), [(0, 1), (2, 3), (3, 4), (4, 4)])
def test_stop_request_ends_the_evaluation_after_the_current_batch(model, make_evaluation, after, num_forwards):
    """`is_requested` is read after each of three validation batches, after the batch of items, and at the end."""
    forwards = []
    hook = model.transformer.register_forward_hook(lambda *_: forwards.append(None))
    try:
        assert make_evaluation(stop=Stop(after)).run(model, model, 4) is None
    finally:
        hook.remove()
    assert len(forwards) == num_forwards


def test_diverged_model_has_a_loss_but_no_metrics_or_samples(model, make_evaluation, capsys):
    diverged = copy.deepcopy(model)
    torch.nn.init.constant_(diverged.transformer.ln_f.weight, float("nan"))
    result = make_evaluation().run(diverged, diverged, 4)
    assert math.isnan(result.val_loss)
    assert (result.hellaswag, result.samples) == (None, [])
    assert capsys.readouterr().out.startswith("warning: HellaSwag was not scored: the model's log-likelihoods are not")


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
