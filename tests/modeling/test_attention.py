"""Attention backends, all kinds of masks, packed documents."""

import itertools

import pytest
import torch
from transformers import AttentionInterface

from modeling_gpt2repro import GPT2ReproModel
from modeling_gpt2repro.modeling_gpt2repro import eager_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def backends():
    """Return all attention kernels, with skips for those that need a GPU or flash-attn."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    gpu = DEVICE == "cuda"
    flash = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    skips = {
        name: pytest.mark.skipif(not (gpu and is_available()), reason=f"no {name} with CUDA")
        for name, is_available in flash.items()
    }
    return ["sdpa", "flex_attention", *(pytest.param(name, marks=skip) for name, skip in skips.items())]


@pytest.fixture
def left_padding(input_ids):
    mask = torch.ones_like(input_ids)
    mask[0, :30] = 0
    mask[2, :1] = 0
    return mask


@torch.no_grad()
@pytest.mark.parametrize("kernel", backends())
@pytest.mark.parametrize("masked", ["full", "left padded", "packed"])
def test_backends_agree_with_eager(model, input_ids, left_padding, kernel, masked):
    half = "flash_attention" in kernel
    model = model.to(DEVICE, torch.bfloat16 if half else torch.float32).eval()
    inputs = {"input_ids": input_ids}
    if masked == "left padded":
        inputs["attention_mask"] = left_padding
    if masked == "packed":
        rows = slice(0, 1) if half else slice(None)
        inputs = {"input_ids": input_ids[rows], "position_ids": packed_positions(20, 21, 7).expand(3, -1)[rows]}
    inputs = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    real = left_padding.bool() if masked == "left padded" else torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    model.set_attn_implementation("eager")
    eager = model(**inputs).logits[real]
    model.set_attn_implementation(kernel)
    assert model.config._attn_implementation == kernel
    fused = model(**inputs).logits[real]
    assert not torch.equal(eager, fused)  # another kernel ran
    tolerance = 0.05 if half else 1e-5
    torch.testing.assert_close(fused, eager, atol=tolerance, rtol=tolerance)


def packed_positions(*lengths):
    return torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("training", [True, False])
def test_packed_documents_equal_unpacked_ones(model, input_ids, kernel, training):
    """Compare in both modes: outside training, the model creates a cache by default."""
    model.train(training).set_attn_implementation(kernel)
    documents = [input_ids[:1, :20], input_ids[1:2, :21], input_ids[2:, :7]]
    packed = torch.cat(documents, dim=1)
    packed_logits = model(packed, position_ids=packed_positions(20, 21, 7)).logits
    separate = torch.cat([model(document).logits for document in documents], dim=1)
    torch.testing.assert_close(packed_logits, separate, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(packed).logits[:, 20:], separate[:, 20:], atol=1e-3)


@pytest.mark.parametrize(("kernel", "is_causal"), [("flash_attention_2", True), ("sdpa", False)])
def test_packed_documents_are_refused_where_they_would_attend_to_each_other(model, input_ids, kernel, is_causal):
    """transformers would give flash attention no mask for several rows, and a bidirectional mask without documents."""
    model.config._attn_implementation = kernel
    positions = packed_positions(20, 21, 7).expand(3, -1)
    with pytest.raises(ValueError, match="packed documents"):
        model.eval()(input_ids, position_ids=positions, is_causal=is_causal, use_cache=False)


def test_packed_documents_give_the_gradients_of_unpacked_ones(model, input_ids):
    model.train()
    documents = [input_ids[:1, :20], input_ids[1:2, :28]]
    count = 19 + 27
    for document in documents:
        model(document, labels=document, num_items_in_batch=count).loss.backward()
    separate = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    packed = torch.cat(documents, dim=1)
    labels = packed.clone()
    labels[:, 20] = -100  # the first document's last token must not predict the second document's first
    model(packed, position_ids=packed_positions(20, 28), labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, separate[name], atol=1e-6, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("form", ["boolean", "additive", "additive in float64"])
def test_4d_mask_replaces_the_causal_mask(model, input_ids, kernel, form):
    """A tree of two continuations of one prefix gives the logits of each sequence on its own."""
    model.eval().set_attn_implementation(kernel)
    prefix, first, second = input_ids[:1, :10], input_ids[1:2, :5], input_ids[2:, :5]
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    mask[..., 15:, 10:15] = False
    if form != "boolean":
        dtype = torch.float64 if "64" in form else torch.float32
        mask = torch.zeros(1, 1, 20, 20, dtype=dtype).masked_fill(~mask, torch.finfo(torch.float32).min)
    positions = torch.cat([torch.arange(15), torch.arange(10, 15)]).unsqueeze(0)
    tree = model(torch.cat([prefix, first, second], 1), attention_mask=mask, position_ids=positions).logits
    single = model(torch.cat([prefix, second], 1)).logits
    torch.testing.assert_close(tree[:, :10], single[:, :10], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tree[:, 15:], single[:, 10:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kernel", "set_by"),
    [
        *itertools.product(["sdpa", "eager", "flex_attention"], ["config", "call"]),
        *itertools.product(["sdpa", "eager"], ["4D mask"]),
    ],
)
def test_bidirectional_attention_sees_later_tokens_but_no_padding(tiny_config, input_ids, left_padding, kernel, set_by):
    torch.manual_seed(0)
    tiny_config.is_causal = set_by != "config"
    model = GPT2ReproModel._from_config(tiny_config, attn_implementation=kernel).eval()
    inputs = {"attention_mask": left_padding}
    if set_by == "call":
        inputs["is_causal"] = False
    elif set_by == "4D mask":
        inputs["attention_mask"] = left_padding[:, None, None, :].bool().expand(-1, 1, 48, -1)
        inputs["position_ids"] = (left_padding.cumsum(-1) - 1).clamp(min=0)
    changed = input_ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 50257
    before, after = (model(ids, **inputs).last_hidden_state for ids in (input_ids, changed))
    real = left_padding.bool()
    real[:, -1] = False
    assert ((before - after).abs().amax(-1)[real] > 1e-6).all()  # the last token changed the output of all real tokens
    if set_by != "4D mask":  # padding changed none of them
        single = model(input_ids[:1, 30:], is_causal=False)
        torch.testing.assert_close(before[:1, 30:], single.last_hidden_state, atol=1e-5, rtol=1e-5)
        assert single.past_key_values is None


@torch.no_grad()
def test_masks_that_would_give_wrong_results_are_refused(model, input_ids):
    model.eval()
    with pytest.raises(ValueError, match=r"2D or 4D.*\(3, 48, 48\)"):
        model(input_ids, attention_mask=torch.ones(3, 48, 48))
    with pytest.raises(ValueError, match=r"4D attention_mask.*int64"):
        model(input_ids, attention_mask=torch.ones(3, 1, 48, 48, dtype=torch.long))
    with pytest.raises(ValueError, match="is_causal=False"):
        model(input_ids, is_causal=False, use_cache=True)
    for kernel in ("flash_attention_2", "flex_attention"):
        model.config._attn_implementation = kernel
        with pytest.raises(ValueError, match=rf"{kernel}.*4D"):
            model(input_ids, attention_mask=torch.ones(3, 1, 48, 48, dtype=torch.bool))


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"attention_mask": torch.ones(3, 40)},
        {"attention_mask": torch.ones(3, 60)},
        {"attention_mask": torch.ones(2, 48)},
        {"position_ids": torch.arange(17, 65).unsqueeze(0)},
        {"position_ids": torch.arange(-1, 47).unsqueeze(0)},
    ],
    ids=lambda arguments: " ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in arguments.items()),
)
def test_masks_and_positions_that_do_not_fit_raise(model, input_ids, kernel, arguments):
    model.eval().set_attn_implementation(kernel)
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        model(input_ids, **arguments)


@torch.no_grad()
def test_block_mask_reaches_flex_attention(model, input_ids):
    from torch.nn.attention.flex_attention import create_block_mask

    mask = create_block_mask(lambda b, h, q, k: (q >= k) & (q // 16 == k // 16), None, None, 48, 48, device="cpu")
    model.eval().set_attn_implementation("flex_attention")
    blocks = model(input_ids, attention_mask=mask, position_ids=packed_positions(16, 16, 16)).logits
    model.set_attn_implementation("sdpa")
    expected = model(input_ids, position_ids=packed_positions(16, 16, 16).expand(3, -1)).logits
    torch.testing.assert_close(blocks, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_registered_attention_function_gets_all_keyword_arguments(model, input_ids):
    """Inference engines register their own kernels and pass them keyword arguments through the model."""
    calls = []

    def recording(module, query, key, value, attention_mask, **kwargs):
        calls.append((module.layer_idx, kwargs))
        mask = torch.full((query.shape[2], key.shape[2]), torch.finfo(query.dtype).min).triu(1)
        return eager_attention(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("recording", recording)
    expected = model.eval()(input_ids).logits
    model.set_attn_implementation("recording")
    logits = model(input_ids, page_table="a table").logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert [layer for layer, _ in calls] == [0, 1, 2]
    assert all(kwargs["page_table"] == "a table" and kwargs["scaling"] == 0.25 for _, kwargs in calls)
