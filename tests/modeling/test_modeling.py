"""The forward and backward pass, compared with transformers' GPT-2 and the paper; labels, logits and refusals."""

import copy
import logging
import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM

PARAMETERS = {"124M": 124_439_808, "350M": 354_823_168, "774M": 774_030_080, "1558M": 1_557_611_200}


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameter_counts_of_the_four_sizes(size):
    with torch.device("meta"):
        model = GPT2ReproForCausalLM(GPT2ReproConfig.from_size(size))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.num_parameters() == PARAMETERS[size]
    assert model.config.n_embd // model.config.n_head == 64
    assert model.get_input_embeddings().weight.shape[0] == 50257


@torch.no_grad()
def test_forward_equals_transformers_gpt2(pair, input_ids):
    outputs, reference = (m(input_ids, labels=input_ids) for m in pair)
    assert reference.logits.abs().max() > 1  # far from the flat logits of an untrained model
    torch.testing.assert_close(outputs.logits, reference.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.loss, reference.loss, atol=1e-6, rtol=1e-6)


def test_gradients_equal_transformers_gpt2(pair, input_ids):
    for candidate in pair:
        candidate.train()(input_ids, labels=input_ids).loss.backward()
    references = {name: parameter.grad for name, parameter in pair[1].named_parameters()}
    for name, parameter in pair[0].named_parameters():
        reference = references[name]
        if parameter.dim() == 2 and ".h." in name:
            reference = reference.T
        torch.testing.assert_close(parameter.grad, reference, atol=1e-7, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_bf16_error_is_no_larger_than_that_of_transformers(pair, input_ids):
    """The two models sum in different orders, so compare their errors relative to float32 logits."""
    exact = pair[1](input_ids).logits
    actual, reference = (m.bfloat16()(input_ids).logits.float() for m in pair)
    error = (reference - exact).norm() / exact.norm()
    assert error > 1e-4
    assert (actual - exact).norm() / exact.norm() < 1.5 * error
    assert (actual - reference).norm() / exact.norm() < 2 * error


@pytest.mark.parametrize("autocast", [True, False])
def test_residual_stream_in_16_bits_only_under_autocast(model, input_ids, autocast):
    model.eval()
    results = []
    for is_16_bit in (False, True):
        model.config.residual_in_autocast_dtype = is_16_bit
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
            outputs = model(input_ids, labels=input_ids, output_hidden_states=True)
        expected = torch.bfloat16 if is_16_bit and autocast else torch.float32
        assert {states.dtype for states in outputs.hidden_states[:-1]} == {expected}  # the last one is after ln_f
        results.append(outputs.loss)
    assert torch.equal(*results) is not autocast
    torch.testing.assert_close(results[0], results[1], atol=0.02, rtol=0)


@pytest.mark.parametrize("fields", [("embd_pdrop",), ("attn_pdrop",), ("resid_pdrop",), ()])
def test_dropout_is_applied_where_gpt2_applies_it(gpt2, input_ids, fields):
    """With one seed, both models drop the same elements only if they call dropout at the same places."""
    rates = dict.fromkeys(fields or ("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.3)
    reference = GPT2LMHeadModel(GPT2Config(**{**gpt2.config.to_dict(), **rates}))
    reference.load_state_dict(gpt2.state_dict())
    reference.set_attn_implementation("eager")
    model = GPT2ReproForCausalLM.from_gpt2(reference)
    logits = []
    for candidate in (model.train(), reference.train()):
        torch.manual_seed(3)
        logits.append(candidate(input_ids).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=2e-5, rtol=0)
    with torch.no_grad():
        assert not torch.allclose(model.eval()(input_ids).logits, logits[0], atol=1e-2)  # something was dropped


def test_initial_std_of_all_weights():
    """GPT-2 paper, section 2.3: 0.02, but 0.02 / sqrt(2 n_layer) for residual projections, and biases of 0."""
    torch.manual_seed(0)
    model = GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=6, n_head=4, n_embd=256, n_positions=256))
    stds = dict.fromkeys(("wte", "wpe", "c_attn", "c_fc"), 0.02) | {"c_proj": 0.02 / math.sqrt(2 * 6)}
    seen = set()
    for name, parameter in model.named_parameters():
        *_, layer, kind = name.split(".")
        if layer.startswith("ln_") or kind == "bias":
            assert (parameter == (1.0 if kind == "weight" else 0.0)).all(), name
            continue
        seen.add(layer)
        # The standard error of a standard deviation over n samples is std / sqrt(2 n).
        error = stds[layer] / math.sqrt(parameter.numel())
        assert abs(parameter.std().item() - stds[layer]) < 5 * error / math.sqrt(2), name
        assert abs(parameter.mean().item()) < 5 * error, name
    assert seen == set(stds)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_training_uses_flash_attention(model, input_ids, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: the CUDA flash kernel was not checked")
    model = model.to(device).train()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile, torch.autocast(device, torch.bfloat16):
        model(input_ids.to(device), labels=input_ids.to(device)).loss.backward()
    names = {event.key for event in profile.key_averages()}
    flash = {
        "cpu": {"aten::_scaled_dot_product_flash_attention_for_cpu"},
        "cuda": {"aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_cudnn_attention"},
    }[device]
    assert names & flash, sorted(name for name in names if "attention" in name)
    assert any(name.endswith("_backward") and "attention" in name for name in names)
    assert "aten::_scaled_dot_product_attention_math" not in names


@torch.no_grad()
@pytest.mark.parametrize("requested", [True, [0], [1, -1], (3, 2), [-4, 7], 2, 0, [], False, None], ids=str)
def test_hidden_states_equal_those_of_gpt2(pair, input_ids, requested):
    outputs, reference = (m(input_ids, output_hidden_states=requested).hidden_states for m in pair)
    assert (outputs is None) == (reference is None)
    for actual, expected in zip(outputs or (), reference or (), strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attentions_under_sdpa_are_empty_with_one_warning(pair, input_ids, caplog):
    logging.Logger.warning_once.cache_clear()  # an earlier test in this process may have caused the warning
    for candidate in pair:
        assert candidate(input_ids, output_attentions=True).attentions == ()
        assert candidate(input_ids, output_attentions=True, return_dict=False)[2] == ()
    warnings = [record.getMessage() for record in caplog.records if "output_attentions" in record.getMessage()]
    assert len(warnings) == 1 and "eager" in warnings[0]


@torch.no_grad()
def test_loss_shifts_the_labels(model, input_ids):
    model.eval()
    outputs = model(input_ids, labels=input_ids)
    expected = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, expected)
    torch.testing.assert_close(model(input_ids[:, :-1], shift_labels=input_ids[:, 1:]).loss, expected)
    halved = model(input_ids, labels=input_ids, num_items_in_batch=2 * input_ids[:, 1:].numel()).loss
    torch.testing.assert_close(halved, expected / 2)
    other = input_ids.flip(1)
    both = model(input_ids, labels=other, shift_labels=input_ids).loss  # as in Trainer's context parallelism
    assert both == model(input_ids, shift_labels=input_ids).loss != model(input_ids, labels=other).loss


def test_use_of_logits_in_training_raises_with_the_remedy(model, input_ids):
    uses = {
        "slice": lambda logits: logits[..., :-1, :],
        "method": lambda logits: logits.view(-1, 50257),
        "function": lambda logits: torch.nn.functional.log_softmax(logits, dim=-1),
        "operator": lambda logits: logits / 2,
        "reflected operator": lambda logits: 2 * logits,
        "negation": lambda logits: -logits,
        "iteration": lambda logits: list(logits),
        "shape": lambda logits: logits.shape,
    }
    outputs = model.train()(input_ids, labels=input_ids)
    plain = model(input_ids, labels=input_ids, return_dict=False)
    for logits in (outputs.logits, outputs["logits"], outputs[1], plain[1], copy.copy(outputs).logits):
        for name, use in uses.items():
            with pytest.raises((TypeError, AttributeError), match="logits_in_training = True"):
                print(name, use(logits))
    assert "LogitsNotComputed" in repr(outputs)


@pytest.mark.parametrize("return_dict", [True, False])
def test_logits_in_training_are_returned_on_request(model, input_ids, return_dict):
    def call(index=1, **arguments):
        return model(input_ids, return_dict=return_dict, **arguments)[index]

    with torch.no_grad():
        expected = model.eval()(input_ids).logits
    model.train()
    assert model(input_ids, labels=input_ids).past_key_values is None
    torch.testing.assert_close(call(labels=input_ids, return_logits=True), expected)
    torch.testing.assert_close(call(0), expected)
    model.config.logits_in_training = True
    torch.testing.assert_close(call(labels=input_ids), expected)
    own_loss = cross_entropy(expected[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    torch.testing.assert_close(call(0, labels=input_ids), own_loss)
    for training in (True, False):
        assert model.train(training)(input_ids, labels=input_ids, return_logits=False).logits is None


@torch.no_grad()
def test_logits_to_keep_selects_positions(model, input_ids):
    model.eval()
    all_logits = model(input_ids).logits
    torch.testing.assert_close(model(input_ids, logits_to_keep=2).logits, all_logits[:, -2:])
    positions = torch.tensor([0, 5, 47])
    torch.testing.assert_close(model(input_ids, logits_to_keep=positions).logits, all_logits[:, positions])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_real_tokens(model, input_ids, side):
    model.eval()
    padded, mask = torch.full_like(input_ids, 50256), torch.zeros_like(input_ids)
    lengths = [48, 20, 7]
    for row, length in enumerate(lengths):
        columns = slice(48 - length, 48) if side == "left" else slice(0, length)
        padded[row, columns], mask[row, columns] = input_ids[row, :length], 1
    batch = model(padded, attention_mask=mask).logits
    for row, length in enumerate(lengths):
        single = model(input_ids[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(batch[row][mask[row].bool()], single, atol=1e-5, rtol=1e-5)


def test_invalid_inputs_are_refused(model, input_ids):
    with pytest.raises(ValueError, match=r"65 tokens.*n_positions=64"):
        model(torch.zeros(1, 65, dtype=torch.long))
    for arguments in ({}, {"input_ids": input_ids, "inputs_embeds": torch.zeros(3, 48, 64)}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**arguments)
    for name in ("token_type_ids", "encoder_hidden_states", "encoder_attention_mask", "head_mask"):
        with pytest.raises(ValueError, match=name):
            model(input_ids, **{name: input_ids})
