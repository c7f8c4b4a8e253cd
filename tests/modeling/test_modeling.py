import copy
import logging
import math

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM, GPT2ReproModel


def test_forward_equals_transformers_gpt2(gpt2, input_ids):
    model = GPT2ReproForCausalLM.from_gpt2(gpt2).eval()
    gpt2.eval()
    with torch.no_grad():
        outputs = model(input_ids, labels=input_ids, output_hidden_states=True)
        reference_outputs = gpt2(input_ids, labels=input_ids, output_hidden_states=True)
    assert reference_outputs.logits.abs().max() > 1  # far from the flat logits of an untrained model
    torch.testing.assert_close(outputs.logits, reference_outputs.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.loss, reference_outputs.loss, atol=1e-6, rtol=1e-6)
    assert len(outputs.hidden_states) == len(reference_outputs.hidden_states) == 4
    for actual, reference in zip(outputs.hidden_states, reference_outputs.hidden_states, strict=True):
        torch.testing.assert_close(actual, reference, atol=1e-5, rtol=1e-5)


def test_gradients_equal_transformers_gpt2(gpt2, input_ids):
    model = GPT2ReproForCausalLM.from_gpt2(gpt2).train()
    gpt2.train()
    model(input_ids, labels=input_ids).loss.backward()
    gpt2(input_ids, labels=input_ids).loss.backward()
    reference_parameters = dict(gpt2.named_parameters())
    for name, parameter in model.named_parameters():
        reference = reference_parameters[name].grad
        actual = parameter.grad
        if actual.dim() == 2 and actual.shape == reference.T.shape and ".h." in name:
            reference = reference.T
        torch.testing.assert_close(actual, reference, atol=1e-7, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_twenty_training_steps_follow_a_plain_gpt2(small_gpt2):
    """The reference is transformers' GPT-2 with its own loss and the same weights, batches and optimizer."""
    model = GPT2ReproForCausalLM.from_gpt2(small_gpt2).train()
    small_gpt2.train()
    generator = torch.Generator().manual_seed(2)
    batches = torch.randint(0, 50, (20, 4, 33), generator=generator)
    curves = []
    for candidate in (model, small_gpt2):
        optimizer = torch.optim.AdamW(candidate.parameters(), lr=1e-3, betas=(0.9, 0.95))
        losses = []
        for batch in batches:
            loss = candidate(batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(candidate.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert curves[0][0] - curves[0][-1] > 1  # the loss decreased enough to show a difference
    torch.testing.assert_close(curves[0], curves[1], atol=1e-3, rtol=0)


def test_initial_std_of_all_weights():
    """GPT-2 paper, section 2.3: 0.02, but 0.02 / sqrt(2 n_layer) for residual projections, and biases of 0."""
    torch.manual_seed(0)
    config = GPT2ReproConfig(n_layer=6, n_head=4, n_embd=256, n_positions=256)
    model = GPT2ReproForCausalLM(config)
    residual = 0.02 / math.sqrt(2 * 6)
    seen = set()
    for name, parameter in model.named_parameters():
        if name.endswith(("attn.c_proj.weight", "mlp.c_proj.weight")):
            expected = residual
        elif name.endswith(("wte.weight", "wpe.weight", "c_attn.weight", "c_fc.weight")):
            expected = 0.02
        elif ".ln_" in name:
            assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all(), name
            continue
        else:
            assert name.endswith("bias"), name
            assert (parameter == 0).all(), name
            continue
        seen.add(name.split(".", 3)[-1] if ".h." in name else name)
        # The standard error of a standard deviation over n samples is std / sqrt(2 n).
        tolerance = 5 * expected / math.sqrt(2 * parameter.numel())
        assert abs(parameter.std().item() - expected) < tolerance, name
        assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(parameter.numel()), name
    assert seen == {
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "attn.c_attn.weight",
        "attn.c_proj.weight",
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
    }


def test_head_is_tied_and_counted_once(model):
    assert model.lm_head.weight is model.transformer.wte.weight
    d, v, t = 64, 50257, 64
    assert model.num_parameters() == v * d + t * d + 3 * (12 * d * d + 13 * d) + 2 * d


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


def test_sdpa_and_eager_agree(model, input_ids):
    model.eval()
    with torch.no_grad():
        sdpa = model(input_ids).logits
        model.set_attn_implementation("eager")
        eager = model(input_ids, output_attentions=True)
    torch.testing.assert_close(sdpa, eager.logits, atol=1e-5, rtol=1e-5)
    assert [tuple(a.shape) for a in eager.attentions] == [(3, 4, 48, 48)] * 3
    future = torch.triu(torch.ones(48, 48, dtype=torch.bool), diagonal=1)
    for weights in eager.attentions:
        assert (weights[..., future] == 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 48))


@pytest.mark.parametrize("requested", [True, [0], [1, -1], (3, 2), [-4, 7], 2, 0, [], False, None], ids=str)
def test_hidden_states_equal_those_of_gpt2(gpt2, input_ids, requested):
    model = GPT2ReproForCausalLM.from_gpt2(gpt2).eval()
    with torch.no_grad():
        reference_outputs = gpt2.eval()(input_ids, output_hidden_states=requested).hidden_states
        outputs = model(input_ids, output_hidden_states=requested).hidden_states
    assert (outputs is None) == (reference_outputs is None)
    for actual, reference in zip(outputs or (), reference_outputs or (), strict=True):
        assert (actual is None) == (reference is None)
        if reference is not None:
            torch.testing.assert_close(actual, reference, atol=1e-5, rtol=1e-5)


def test_attentions_under_sdpa_are_empty_with_one_warning(gpt2, input_ids, caplog):
    logging.Logger.warning_once.cache_clear()  # an earlier test in this process may have caused the warning
    model = GPT2ReproForCausalLM.from_gpt2(gpt2).eval()
    arguments = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 50256}
    for candidate in (gpt2.eval(), model):
        assert candidate(input_ids, output_attentions=True).attentions == ()
        assert candidate(input_ids, output_attentions=True, return_dict=False)[2] == ()
        generated = candidate.generate(
            input_ids,
            output_attentions=True,
            return_dict_in_generate=True,
            attention_mask=input_ids * 0 + 1,
            **arguments,
        )
        assert generated.attentions == ((), ())
    warnings = [record.getMessage() for record in caplog.records if "output_attentions" in record.getMessage()]
    assert len(warnings) == 1 and "'sdpa'" in warnings[0] and "'eager'" in warnings[0]


def test_logits_do_not_depend_on_later_tokens(model, input_ids):
    model.eval()
    changed = input_ids.clone()
    changed[:, 30:] = (changed[:, 30:] + 1) % 50257
    with torch.no_grad():
        before, after = model(input_ids).logits, model(changed).logits
    assert torch.equal(before[:, :30], after[:, :30])
    assert not torch.equal(before[:, 30:], after[:, 30:])


def test_loss_shifts_the_labels(model, input_ids):
    model.eval()
    with torch.no_grad():
        outputs = model(input_ids, labels=input_ids)
        expected = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
        torch.testing.assert_close(outputs.loss, expected)
        shifted = model(input_ids[:, :-1], shift_labels=input_ids[:, 1:]).loss
        torch.testing.assert_close(shifted, expected)
        halved = model(input_ids, labels=input_ids, num_items_in_batch=2 * input_ids[:, 1:].numel()).loss
        torch.testing.assert_close(halved, expected / 2)
        other = input_ids.flip(1)
        both = model(input_ids, labels=other, shift_labels=input_ids).loss  # as in Trainer's context parallelism
        torch.testing.assert_close(both, model(input_ids, shift_labels=input_ids).loss, rtol=0, atol=0)
        assert both != model(input_ids, labels=other).loss


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
    with torch.no_grad():
        expected = model.eval()(input_ids, labels=input_ids, return_dict=return_dict)[1]
    model.train()
    assert model(input_ids, labels=input_ids).past_key_values is None

    def logits(**arguments):
        return model(input_ids, return_dict=return_dict, **arguments)[1 if "labels" in arguments else 0]

    torch.testing.assert_close(logits(labels=input_ids, return_logits=True), expected)
    torch.testing.assert_close(logits(), expected)
    model.config.logits_in_training = True
    outputs = model(input_ids, labels=input_ids, return_dict=return_dict)
    torch.testing.assert_close(outputs[1], expected)
    own_loss = torch.nn.functional.cross_entropy(outputs[1][:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    torch.testing.assert_close(outputs[0], own_loss)
    assert model(input_ids, labels=input_ids, return_logits=False).logits is None
    model.eval()
    assert model(input_ids, labels=input_ids, return_logits=False).logits is None


def test_logits_to_keep_selects_positions(model, input_ids):
    model.eval()
    with torch.no_grad():
        all_logits = model(input_ids).logits
        torch.testing.assert_close(model(input_ids, logits_to_keep=2).logits, all_logits[:, -2:])
        positions = torch.tensor([0, 5, 47])
        torch.testing.assert_close(model(input_ids, logits_to_keep=positions).logits, all_logits[:, positions])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_real_tokens(model, input_ids, side):
    model.eval()
    lengths = [48, 20, 7]
    padded = torch.full_like(input_ids, 50256)
    mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        columns = slice(48 - length, 48) if side == "left" else slice(0, length)
        padded[row, columns] = input_ids[row, :length]
        mask[row, columns] = 1
    with torch.no_grad():
        batch = model(padded, attention_mask=mask).logits
        for row, length in enumerate(lengths):
            single = model(input_ids[row : row + 1, :length]).logits[0]
            torch.testing.assert_close(batch[row][mask[row].bool()], single, atol=1e-5, rtol=1e-5)


def test_decoding_with_a_cache_equals_one_forward(model, input_ids):
    model.eval()
    with torch.no_grad():
        full = model(input_ids).logits
        prefill = model(input_ids[:, :40], use_cache=True)
        chunks, cache = [prefill.logits], prefill.past_key_values
        for position in range(40, 48):
            step = model(input_ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            chunks.append(step.logits)
    torch.testing.assert_close(torch.cat(chunks, dim=1), full, atol=1e-5, rtol=1e-5)


def test_greedy_text_equals_transformers_gpt2(gpt2, input_ids):
    model = GPT2ReproForCausalLM.from_gpt2(gpt2).eval()
    prompt = {"input_ids": input_ids[:, :8], "attention_mask": torch.ones(3, 8, dtype=torch.long)}
    arguments = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 50256}
    assert torch.equal(model.generate(**prompt, **arguments), gpt2.eval().generate(**prompt, **arguments))


def test_invalid_inputs_are_refused(model, input_ids):
    with pytest.raises(ValueError, match=r"65 tokens.*n_positions=64"):
        model(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    for name in ("token_type_ids", "encoder_hidden_states", "head_mask"):
        with pytest.raises(ValueError, match=name):
            model(input_ids, **{name: input_ids})
    with pytest.raises(ValueError, match=r"Cache.*tuple"):
        model(input_ids, past_key_values=((input_ids, input_ids),))


def test_inputs_embeds_equal_input_ids(model, input_ids):
    model.eval()
    with torch.no_grad():
        embeds = model.get_input_embeddings()(input_ids)
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(input_ids).logits)


def test_dropout_is_off_by_default_and_applied_if_set(tiny_config, input_ids):
    model = GPT2ReproForCausalLM(tiny_config).train()
    assert torch.equal(model(input_ids, labels=input_ids).loss, model(input_ids, labels=input_ids).loss)
    for field in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        config = GPT2ReproConfig(**{**tiny_config.to_dict(), field: 0.5})
        noisy = GPT2ReproForCausalLM(config).train()
        assert not torch.equal(noisy(input_ids, labels=input_ids).loss, noisy(input_ids, labels=input_ids).loss)


def test_auto_classes_know_the_model(model, input_ids, tmp_path):
    model.eval().save_pretrained(tmp_path)
    causal = AutoModelForCausalLM.from_pretrained(tmp_path)
    trunk = AutoModel.from_pretrained(tmp_path)
    assert type(causal) is GPT2ReproForCausalLM
    assert type(trunk) is GPT2ReproModel
    assert causal.lm_head.weight is causal.transformer.wte.weight
    with torch.no_grad():
        expected = model(input_ids).logits
        assert torch.equal(causal(input_ids).logits, expected)
        assert torch.equal(causal.lm_head(trunk(input_ids).last_hidden_state), expected)
