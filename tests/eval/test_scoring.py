"""Log-likelihoods: the right tokens, whatever the batch."""

import copy
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from eval import EvalError
from eval.scoring import loglikelihoods

VOCABULARY = 61
CONTEXT = 24


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=2,
            n_embd=32,
            n_head=2,
            n_positions=CONTEXT,
            vocab_size=VOCABULARY,
            initializer_range=0.3,
            resid_pdrop=0.5,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


@pytest.fixture(scope="module")
def reference(model):
    """One sequence at a time, all logits, in float64."""
    double = copy.deepcopy(model).double().eval()

    def score(context, continuation):
        tokens = context + continuation
        with torch.no_grad():
            log_probs = double(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
        return sum(log_probs[t - 1, tokens[t]].item() for t in range(len(context), len(tokens)))

    return score


class BigramModel(torch.nn.Module):
    """
    The next token depends on the last one only: after `a` comes `a + 1` with a probability of 1/2, and the
    rest is shared evenly. After padding, nothing has a probability.
    """

    def __init__(self, max_length=16, dtype=torch.float32):
        super().__init__()
        table = torch.full((10, 10), 0.5 / 9)
        for token in range(10):
            table[token, (token + 1) % 10] = 0.5
        self.log_probs = torch.nn.Parameter(table.log().to(dtype), requires_grad=False)
        self.config = SimpleNamespace(vocab_size=10, max_position_embeddings=max_length)
        self.calls = []

    def forward(self, input_ids, attention_mask, use_cache, logits_to_keep):
        assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        self.calls.append((input_ids, attention_mask, logits_to_keep))
        logits = self.log_probs[input_ids].clone()
        logits[attention_mask == 0] = -torch.inf
        return SimpleNamespace(logits=logits)  # all of them: models are free to ignore logits_to_keep


def some_requests(number, seed=0):
    rng = random.Random(seed)

    def tokens(longest):
        return [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, longest))]

    return [(tokens(15), tokens(8)) for _ in range(number)]


def test_equals_one_sequence_at_a_time_in_float64(model, reference):
    requests = some_requests(24)
    scores = loglikelihoods(model, requests, batch_size=7)
    assert [score.log_likelihood for score in scores] == pytest.approx(
        [reference(*request) for request in requests], abs=1e-4
    )
    assert [score.num_tokens for score in scores] == [len(continuation) for _, continuation in requests]
    assert all(score.num_cut == 0 for score in scores)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), number=st.integers(0, 7), batch_size=st.integers(1, 8))
def test_batch_size_does_not_matter(model, seed, number, batch_size):
    requests = some_requests(number, seed)
    alone = [loglikelihoods(model, [request], batch_size=1)[0].log_likelihood for request in requests]
    together = [score.log_likelihood for score in loglikelihoods(model, requests, batch_size=batch_size)]
    assert together == pytest.approx(alone, abs=1e-4)


def test_scores_the_continuation_and_nothing_else():
    """Known probabilities: 1/2 a step, 1/18 a jump. Any step scored too many or too few, or a pad, shows."""
    step, jump = torch.tensor([0.5, 0.5 / 9]).log().tolist()
    requests = [
        ([5, 1, 7], [8, 9]),  # jumps in the context, steps in the continuation
        ([1, 2, 3, 4, 5, 6, 7], [9]),
        ([3], [4, 5, 8, 0, 1]),
        ([0, 0, 0, 0], [1]),  # token 0 is also what pads
        ([9], [0]),
    ]
    for batch_size in (1, 2, 5):
        scores = loglikelihoods(BigramModel(), requests, batch_size=batch_size)
        expected = [2 * step, jump, 3 * step + 2 * jump, step, step]
        assert [score.log_likelihood for score in scores] == pytest.approx(expected, abs=1e-5)


def test_the_model_sees_right_padding_behind_a_mask_and_gives_few_logits():
    model = BigramModel()
    loglikelihoods(model, [([1, 2, 3, 4, 5, 6], [7, 8]), ([1, 2, 3], [4, 5])], batch_size=2)
    [(input_ids, attention_mask, logits_to_keep)] = model.calls
    assert input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 0, 0, 0]]
    assert attention_mask.tolist() == [[1] * 7, [1] * 4 + [0] * 3]
    assert logits_to_keep == 5  # position 2, after which 4 is scored, is the fifth from the end


def test_longest_sequences_go_first():
    model = BigramModel()
    loglikelihoods(model, [([1] * n, [2]) for n in (2, 9, 4, 7)], batch_size=1)
    assert [input_ids.shape[1] for input_ids, *_ in model.calls] == [9, 7, 4, 2]


def test_what_does_not_fit_is_cut_on_the_left_and_counted(model, reference):
    context, continuation = [t % VOCABULARY for t in range(40)], [7, 3, 11]
    fits = context[-(CONTEXT + 1 - 3) :]  # the last token is never an input, so one more than CONTEXT
    [cut, exact] = loglikelihoods(model, [(context, continuation), (fits, continuation)], batch_size=2)
    assert (cut.num_cut, exact.num_cut) == (40 - len(fits), 0)
    assert cut.log_likelihood == pytest.approx(reference(fits, continuation), abs=1e-4)
    assert exact.log_likelihood == pytest.approx(cut.log_likelihood, abs=1e-6)
    assert loglikelihoods(model, [(context, [5] * CONTEXT)], batch_size=1)[0].num_cut == 39


def test_modes_are_restored_and_dropout_is_off(model, reference):
    request = ([1, 2, 3], [4, 5, 6])
    model.train()
    frozen = model.transformer.h[0].eval()
    try:
        [score] = loglikelihoods(model, [request], batch_size=1)
        assert score.log_likelihood == pytest.approx(reference(*request), abs=1e-4)
        assert model.training and model.transformer.h[1].training and not frozen.training
    finally:
        model.eval()


def test_under_autocast(model, reference):
    requests = some_requests(10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = loglikelihoods(model, requests, batch_size=4)
    for score, request in zip(scores, requests, strict=True):
        assert score.log_likelihood == pytest.approx(reference(*request), rel=0.05, abs=0.2)


def test_softmax_is_in_float32():
    model = BigramModel(dtype=torch.bfloat16)
    expected = model.log_probs[3].float().log_softmax(-1)[4].item()
    [score] = loglikelihoods(model, [([3], [4])], batch_size=1)
    assert score.log_likelihood == pytest.approx(expected, abs=1e-6)


def test_progress_is_told_every_score():
    seen = []
    requests = [([1] * n, [2]) for n in (2, 9, 4)]
    scores = loglikelihoods(BigramModel(), requests, batch_size=2, on_batch=seen.append)
    assert [len(batch) for batch in seen] == [2, 1]
    assert sorted(score for batch in seen for score in batch) == sorted(scores)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (([], [1]), "request 1: the context has no tokens"),
        (([1], []), "request 1: the continuation has no tokens"),
        (([1, 10], [2]), "token ids 1 to 10 do not fit the model's vocabulary of 10"),
        (([1], [-1]), "token ids -1 to 1 do not fit"),
        (([1], [2] * 17), "a continuation of 17 tokens does not fit the model's context of 16"),
    ],
)
def test_bad_requests_are_named_before_the_model_runs(request_, message):
    model = BigramModel()
    with pytest.raises(EvalError, match=message):
        loglikelihoods(model, [([1], [2]), request_], batch_size=1)
    assert not model.calls


def test_batch_size_below_one():
    with pytest.raises(EvalError, match="batch_size must be at least 1, got 0"):
        loglikelihoods(BigramModel(), [([1], [2])], batch_size=0)


def test_not_finite(model):
    broken = copy.deepcopy(model).train()
    torch.nn.init.constant_(broken.transformer.ln_f.weight, float("nan"))
    with pytest.raises(EvalError, match="not finite"):
        loglikelihoods(broken, [([1], [2])], batch_size=1)
    assert broken.training


def test_importing_it_loads_nothing_heavy(run_python):
    """Training imports these; it must start without the data set and metric packages."""
    names = ("transformers", "datasets", "evaluate", "huggingface_hub")
    run = run_python(
        "-c",
        "import sys\n"
        "from eval.scoring import loglikelihoods\n"
        "from eval.hellaswag.task import score_hellaswag\n"
        "from eval.hellaswag.items import load_items\n"
        "from eval.hellaswag.accuracy import accuracy\n"
        f"print([name for name in {names} if name in sys.modules])",
    )
    assert run.stdout.strip() == "[]", run.stderr
