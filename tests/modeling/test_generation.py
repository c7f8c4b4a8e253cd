"""generate(): every way of decoding gives transformers' GPT-2's tokens, with the same weights."""

import pytest
import torch
from transformers import CompileConfig, DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache, TextStreamer

from modeling_gpt2repro import GPT2ReproForCausalLM

WAYS = {
    "greedy": {"do_sample": False},
    "no cache": {"do_sample": False, "use_cache": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.9},
    "beams": {"do_sample": False, "num_beams": 4, "length_penalty": 0.5},
    "beams sampled": {"do_sample": True, "num_beams": 3, "num_return_sequences": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "repetition penalty": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "static cache": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    "static cache, beams": {
        "do_sample": False,
        "num_beams": 2,
        "cache_implementation": "static",
        "disable_compile": True,
    },
}


@pytest.fixture
def pair(gpt2):
    return GPT2ReproForCausalLM.from_gpt2(gpt2).eval(), gpt2.eval()


@pytest.fixture
def prompts(input_ids):
    """Three prompts of 4, 8 and 6 tokens, padded on the left."""
    ids = input_ids[:, :8].clone()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[2, :2] = 0
    ids[mask == 0] = 50256
    return {"input_ids": ids, "attention_mask": mask}


def texts(model, inputs, **arguments):
    torch.manual_seed(5)
    return model.generate(**inputs, max_new_tokens=16, pad_token_id=50256, **arguments)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_decoding_gives_gpt2s_tokens(pair, prompts, way):
    ours, theirs = (texts(model, prompts, **WAYS[way]) for model in pair)
    assert ours.shape[1] == 24
    assert torch.equal(ours, theirs)


def test_padding_does_not_change_a_greedy_text(pair, prompts):
    model, _ = pair
    batch = texts(model, prompts, do_sample=False)
    for row in range(3):
        real = prompts["attention_mask"][row].bool()
        alone = {"input_ids": prompts["input_ids"][row][real][None], "attention_mask": real[real][None].long()}
        assert torch.equal(texts(model, alone, do_sample=False)[0][real.sum() :], batch[row][8:])


def test_generating_from_embeddings(pair, prompts):
    model, _ = pair
    embeds = model.get_input_embeddings()(prompts["input_ids"])
    mask = {"attention_mask": prompts["attention_mask"]}
    continuation = texts(model, {"inputs_embeds": embeds, **mask}, do_sample=False)
    assert torch.equal(continuation, texts(model, prompts, do_sample=False)[:, 8:])


@pytest.mark.parametrize("assistant", ["a smaller model", "the prompt itself"])
def test_assisted_decoding_changes_nothing_but_speed(pair, prompts, assistant):
    model, _ = pair
    one = {name: tensor[1:2] for name, tensor in prompts.items()}
    if assistant == "a smaller model":
        torch.manual_seed(1)
        config = GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=64)
        helper = {"assistant_model": GPT2ReproForCausalLM.from_gpt2(GPT2LMHeadModel(config)).eval()}
    else:
        helper = {"prompt_lookup_num_tokens": 3}
    assert torch.equal(texts(model, one, do_sample=False, **helper), texts(model, one, do_sample=False))


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_prefill_and_decode_equal_one_forward(pair, input_ids, cache_class):
    model, _ = pair
    cache = DynamicCache() if cache_class is DynamicCache else StaticCache(config=model.config, max_cache_len=60)
    with torch.no_grad():
        whole = model(input_ids).logits
        pieces, start = [], 0
        for length in (30, 1, 1, 10, 1, 5):  # a prompt, single tokens, chunks
            piece = model(input_ids[:, start : start + length], past_key_values=cache, use_cache=True)
            pieces.append(piece.logits)
            start += length
    assert start == 48
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_a_compiled_static_cache_gives_the_same_tokens(pair, prompts):
    """fullgraph: one graph a decoding step. On a CPU generate() compiles only when told so."""
    torch._dynamo.reset()
    model, theirs = pair
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    settings = CompileConfig(fullgraph=True, backend=backend, mode=None)
    settings._compile_all_devices = True
    arguments = {"do_sample": False, "cache_implementation": "static", "compile_config": settings}
    compiled = texts(model, prompts, **arguments)
    assert len(graphs) == 1
    assert torch.equal(compiled, texts(theirs, prompts, do_sample=False))


def test_streaming_prints_what_is_returned(pair, prompts, capsys):
    from data.tokenizer import load_hf_tokenizer

    tokenizer = load_hf_tokenizer()
    model, _ = pair
    one = {name: tensor[1:2] for name, tensor in prompts.items()}
    whole = texts(model, one, do_sample=False, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(whole[0, 8:]).rstrip("\n")


def test_past_the_last_position_is_an_error_that_names_it(pair, prompts):
    model, _ = pair
    with pytest.raises(ValueError, match="n_positions=64"):
        model.generate(**prompts, max_new_tokens=80, do_sample=False, pad_token_id=50256, eos_token_id=None)
