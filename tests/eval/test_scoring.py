"""Test log-likelihoods: of the correct tokens, in any batch."""

import copy
import itertools
import random
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from eval import EvalError, scoring
from eval.scoring import Request, _can_share_context, loglikelihoods
from modeling_gpt2repro import GPT2ReproForCausalLM

VOCABULARY = 61
CONTEXT = 24


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": CONTEXT, "vocab_size": VOCABULARY}
    return GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.3, resid_pdrop=0.5, bos_token_id=0, eos_token_id=0))


@pytest.fixture(scope="module")
def reference(model):
    """Score one sequence at a time in float64: (log-likelihoods of the tokens, whether all are greedy)."""
    double = copy.deepcopy(model).double().eval()

    def score(context, continuation):
        tokens = context + continuation
        with torch.no_grad():
            log_probs = double(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
        positions = range(len(context), len(tokens))
        log_likelihoods = [log_probs[t - 1, tokens[t]].item() for t in positions]
        return log_likelihoods, all(log_probs[t - 1].argmax().item() == tokens[t] for t in positions)

    return score


class BigramModel(torch.nn.Module):
    """After `a`, `a + 1` has probability 1/2 and the other tokens share the rest; after padding, all have 0."""

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


def some_requests(number, seed=0, most=4):
    """Make contexts of up to 15 tokens, with up to `most` continuations of up to 8 tokens; some need several rows."""
    rng = random.Random(seed)

    def tokens(longest):
        return [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, longest))]

    return [Request(tokens(15), [tokens(8) for _ in range(rng.randint(1, most))]) for _ in range(number)]


def sums(scores):
    return [score.log_likelihood for request_scores in scores for score in request_scores]


def pairs(requests):
    return [(request.context, continuation) for request in requests for continuation in request.continuations]


@pytest.fixture(scope="module", params=["shared contexts", "separate rows", "our model"])
def any_model(request, model):
    """Return models with the same weights that are scored with shared contexts and without."""
    if request.param == "our model":
        ours = GPT2ReproForCausalLM.from_gpt2(model)
        assert _can_share_context(ours)
        return ours
    config = copy.deepcopy(model.config)
    other = type(model)._from_config(
        config, attn_implementation="sdpa" if request.param == "shared contexts" else "eager"
    )
    other.load_state_dict(model.state_dict())
    return other


def test_scores_match_single_sequences_in_float64(any_model, reference):
    requests = some_requests(24)
    scores = loglikelihoods(any_model, requests, tokens_per_batch=70)
    assert sums(scores) == pytest.approx([sum(reference(*pair)[0]) for pair in pairs(requests)], abs=1e-4)
    for score, (context, continuation) in zip(itertools.chain(*scores), pairs(requests), strict=True):
        log_likelihoods, greedy = reference(context, continuation)
        assert score.log_likelihoods == pytest.approx(log_likelihoods, abs=1e-4)
        assert score.is_greedy == greedy
        assert score.num_tokens == len(continuation)
        assert score.num_truncated == 0


def test_continuation_is_greedy_if_each_token_is_the_most_probable(model, reference):
    with torch.no_grad():
        best = model.eval()(torch.tensor([[3, 1, 4]])).logits[0, -1].argmax().item()
    continuations = [[best], [(best + 1) % VOCABULARY], [best, 5]]
    [[greedy, other, partly]] = loglikelihoods(model, [Request([3, 1, 4], continuations)])
    assert (greedy.is_greedy, other.is_greedy) == (True, False)
    assert partly.is_greedy == reference([3, 1, 4], [best, 5])[1]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), number=st.integers(0, 5), tokens_per_batch=st.integers(1, 200))
def test_scores_do_not_depend_on_the_batch(model, seed, number, tokens_per_batch):
    requests = some_requests(number, seed)
    alone = [sums(loglikelihoods(model, [Request(c, [k])]))[0] for c, k in pairs(requests)]
    assert sums(loglikelihoods(model, requests, tokens_per_batch=tokens_per_batch)) == pytest.approx(alone, abs=1e-4)
    backwards = [Request(c, k[::-1]) for c, k in requests[::-1]]
    assert sums(loglikelihoods(model, backwards))[::-1] == pytest.approx(alone, abs=1e-4)


def test_rows_share_contexts_longest_first_within_the_budget(model, monkeypatch):
    shapes = []
    forward = type(model.transformer).forward

    def spy(self, input_ids, **kwargs):
        shapes.append(tuple(input_ids.shape))
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(type(model.transformer), "forward", spy)
    context = list(range(10))
    requests = [
        Request(context, [[1] * 4] * 4),  # 10 + 4 * 3 inputs
        Request(context, [[2] * 8] * 4),  # 10 + 7 * 4, more than the context: no continuation ends after it
        Request(context, [[2] * 14] * 4),  # 10 + 13 * 2, and 13 more would be twice the context: two rows
        Request(context, [[3]] * 4),  # only the context
    ]
    loglikelihoods(model, requests, tokens_per_batch=48)
    assert shapes == [(1, 38), (1, 36), (1, 36), (2, 22)]
    shapes.clear()
    loglikelihoods(model, requests, tokens_per_batch=1)
    assert shapes == [(1, 38), (1, 36), (1, 36), (1, 22), (1, 10)]


def test_rows_are_padded_to_few_lengths_as_on_cuda(any_model, reference, monkeypatch):
    requests, lengths = some_requests(24), set()
    monkeypatch.setattr(scoring, "LENGTH_MULTIPLE", {None: 10})
    embedding = any_model.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda _, arguments: lengths.add(arguments[0].shape[1]))
    scores = loglikelihoods(any_model, requests, tokens_per_batch=70)
    hook.remove()
    more = {30} if _can_share_context(any_model) else set()  # rows longer than the context have its mask
    assert lengths == {10, 20, CONTEXT} | more
    assert sums(scores) == pytest.approx([sum(reference(*pair)[0]) for pair in pairs(requests)], abs=1e-4)


def test_mask_is_made_only_for_several_continuations(model, monkeypatch):
    """Plain causal attention has the fastest kernels. Positions must not look like packed documents either."""
    ours = GPT2ReproForCausalLM.from_gpt2(model)
    masks = []
    make_mask = type(ours.transformer)._attention_mask
    monkeypatch.setattr(
        type(ours.transformer), "_attention_mask", lambda *arguments: masks.append(make_mask(*arguments)) or masks[-1]
    )
    loglikelihoods(ours, [Request([1] * n, [[2, 3]]) for n in (9, 4, 2)])
    assert masks == [None]
    loglikelihoods(ours, [Request([1] * 4, [[2, 3], [4]])])
    assert masks[1:] == [None]  # a continuation of one token needs no input
    loglikelihoods(ours, [Request([1] * 4, [[2, 3], [4, 5]])])
    assert masks[2].shape == (1, 1, 6, 6)


def test_only_tokens_of_the_continuation_are_scored():
    """The probability of each increment is 1/2, of any other token 1/18; a wrong or padding token would show."""
    step, jump = torch.tensor([0.5, 0.5 / 9]).log().tolist()
    requests = [
        Request([5, 1, 7], [[8, 9], [9]]),
        Request([1, 2, 3, 4, 5, 6, 7], [[9]]),
        Request([3], [[4, 5, 8, 0, 1]]),
        Request([0, 0, 0, 0], [[1]]),  # token 0 is also the padding
        Request([9], [[0]]),
    ]
    for tokens_per_batch in (1, 8, 100):
        scores = loglikelihoods(BigramModel(), requests, tokens_per_batch=tokens_per_batch)
        expected = [2 * step, jump, jump, 3 * step + 2 * jump, step, step]
        assert sums(scores) == pytest.approx(expected, abs=1e-5)


def test_other_models_get_right_padding_a_mask_and_logits_to_keep():
    model = BigramModel()
    loglikelihoods(model, [Request([1, 2, 3, 4, 5, 6], [[7, 8]]), Request([1, 2, 3], [[4, 5]])])
    [(input_ids, attention_mask, logits_to_keep)] = model.calls
    assert input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 0, 0, 0]]
    assert attention_mask.tolist() == [[1] * 7, [1] * 4 + [0] * 3]
    assert logits_to_keep == 5  # position 2, after which 4 is scored, is the fifth from the end


def test_long_contexts_are_truncated_on_the_left_and_counted(any_model, reference):
    context, continuation = [t % VOCABULARY for t in range(40)], [7, 3, 11]
    fits = context[-(CONTEXT + 1 - 3) :]  # the last token is never an input, so one more than CONTEXT
    [[truncated, shorter], [exact]] = loglikelihoods(
        any_model, [Request(context, [continuation, [5]]), Request(fits, [continuation])]
    )
    assert (truncated.num_truncated, exact.num_truncated) == (40 - len(fits), 0)
    assert shorter.num_truncated == 40 - CONTEXT
    assert truncated.log_likelihood == pytest.approx(sum(reference(fits, continuation)[0]), abs=1e-4)
    assert shorter.log_likelihood == pytest.approx(sum(reference(context[-CONTEXT:], [5])[0]), abs=1e-4)
    assert exact.log_likelihood == pytest.approx(truncated.log_likelihood, abs=1e-5)
    assert loglikelihoods(any_model, [Request(context, [[5] * CONTEXT])])[0][0].num_truncated == 39


def test_dropout_is_off_and_each_modules_mode_is_restored(model, reference):
    model.train()
    frozen = model.transformer.h[0].eval()
    try:
        [[score]] = loglikelihoods(model, [Request([1, 2, 3], [[4, 5, 6]])])
        assert score.log_likelihood == pytest.approx(sum(reference([1, 2, 3], [4, 5, 6])[0]), abs=1e-4)
        assert model.training and model.transformer.h[1].training and not frozen.training
    finally:
        model.eval()


def test_scores_under_autocast_match_within_bfloat16(any_model, reference):
    requests = some_requests(10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = loglikelihoods(any_model, requests)
    for score, pair in zip(sums(scores), pairs(requests), strict=True):
        assert score == pytest.approx(sum(reference(*pair)[0]), rel=0.05, abs=0.2)


def test_softmax_of_a_bfloat16_model_is_in_float32():
    model = BigramModel(dtype=torch.bfloat16)
    expected = model.log_probs[3].float().log_softmax(-1)[4].item()
    [[score]] = loglikelihoods(model, [Request([3], [[4]])])
    assert score.log_likelihood == pytest.approx(expected, abs=1e-6)


def test_first_of_equally_probable_tokens_is_greedy(model):
    """bfloat16 makes many tokens equal; counting all of them would overrate models."""
    flat = copy.deepcopy(model)
    torch.nn.init.zeros_(flat.lm_head.weight)
    for one in (flat, GPT2ReproForCausalLM.from_gpt2(flat)):
        [scores] = loglikelihoods(one, [Request([1, 2], [[0], [1], [VOCABULARY - 1]])])
        assert [score.is_greedy for score in scores] == [True, False, False]


def test_compiled_model_is_scored(model):
    requests = some_requests(3)
    compiled = torch.compile(model, backend="eager")
    assert sums(loglikelihoods(compiled, requests)) == pytest.approx(sums(loglikelihoods(model, requests)), abs=1e-5)


def test_lora_adapter_is_applied(model):
    """The shared-context path calls the base model, which must not skip the adapter."""
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    requests = some_requests(4)
    scores = sums(loglikelihoods(adapted, requests))
    merged = adapted.merge_and_unload()
    assert scores == pytest.approx(sums(loglikelihoods(merged, requests)), abs=1e-3)
    assert scores != pytest.approx(sums(loglikelihoods(model, requests)), abs=1.0)


def test_token_ids_may_be_arrays(model):
    [request] = some_requests(1)
    arrays = Request(np.array(request.context, dtype=np.uint16), [np.array(k, dtype=np.uint16) for k in request[1]])
    assert sums(loglikelihoods(model, [arrays])) == sums(loglikelihoods(model, [request]))


def test_on_batch_counts_every_continuation():
    seen = []
    requests = [Request([1] * n, [[2], [3]]) for n in (2, 9, 4)]
    loglikelihoods(BigramModel(), requests, tokens_per_batch=18, on_batch=seen.append)
    assert seen == [2, 4]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (([], [1]), "request 1: the context has no tokens"),
        (([1], []), "request 1: the continuation has no tokens"),
        (([1, 10], [2]), "token ids 1 to 10 do not fit the model's vocabulary of 10"),
        (([1], [-1]), "token ids -1 to 3 do not fit"),
        (([1], [2] * 17), "a continuation of 17 tokens does not fit the model's context of 16"),
    ],
)
def test_malformed_request_is_named_before_the_model_runs(request_, message):
    model = BigramModel()
    with pytest.raises(EvalError, match=message):
        loglikelihoods(model, [Request([1], [[2]]), Request(request_[0], [[3], request_[1]])])
    bidirectional = copy.deepcopy(model)
    bidirectional.config.is_causal = False
    with pytest.raises(EvalError, match="is_causal=False: its log-likelihoods"):
        loglikelihoods(bidirectional, [])
    with pytest.raises(EvalError, match="tokens_per_batch must be at least 1, got 0"):
        loglikelihoods(model, [Request([1], [[2]])], tokens_per_batch=0)
    assert not model.calls


def test_log_likelihoods_that_are_not_finite_are_an_error(model):
    broken = copy.deepcopy(model).train()
    torch.nn.init.constant_(broken.transformer.ln_f.weight, float("nan"))
    with pytest.raises(EvalError, match="not finite"):
        loglikelihoods(broken, [Request([1], [[2]])])
    assert broken.training
