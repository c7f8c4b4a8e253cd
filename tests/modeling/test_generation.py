"""generate() gives the tokens of transformers' GPT-2 with the same weights, for all decoding methods."""

import pytest
import torch
from torch.utils._pytree import tree_flatten
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    StaticCache,
    WatermarkingConfig,
)

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
    "static cache, beams": {"num_beams": 2, "cache_implementation": "static", "disable_compile": True},
    "cutoffs": {"do_sample": True, "min_p": 0.01, "typical_p": 0.9, "epsilon_cutoff": 1e-5, "eta_cutoff": 1e-5},
    "forbidden and forced": {
        "do_sample": False,
        "bad_words_ids": [[5], [7, 8]],
        "suppress_tokens": [3, 4],
        "sequence_bias": [[[5], 2.0]],
        "min_new_tokens": 5,
        "forced_eos_token_id": 11,
    },
    "a prefix's tokens only": {"do_sample": False, "prefix_allowed_tokens_fn": lambda *_: [*range(100)]},
    "guidance": {"do_sample": False, "guidance_scale": 1.5},
    "the prompt in chunks": {"do_sample": False, "prefill_chunk_size": 3},
    "several of the beams": {"num_beams": 4, "num_return_sequences": 2, "early_stopping": True},
    "watermark": {"do_sample": True, "watermarking_config": WatermarkingConfig(bias=2.5)},
}


@pytest.fixture
def pair(small_pair):
    return small_pair


@pytest.fixture
def model(pair):
    return pair[0]


@pytest.fixture
def prompts(input_ids):
    """Three prompts of 4, 8 and 6 tokens, padded on the left."""
    ids = input_ids[:, :8] % 999
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[2, :2] = 0
    ids[mask == 0] = 999
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def one_prompt(prompts):
    return {name: tensor[1:2] for name, tensor in prompts.items()}


def texts(model, inputs, **arguments):
    torch.manual_seed(5)
    return model.generate(**inputs, max_new_tokens=16, pad_token_id=999, **arguments)


@pytest.mark.parametrize("way", WAYS)
def test_every_decoding_method_gives_the_tokens_of_gpt2(pair, prompts, way):
    tokens, reference_tokens = (texts(model, prompts, **WAYS[way]) for model in pair)
    assert tokens.shape[1] == 24
    assert torch.equal(tokens, reference_tokens)


@pytest.mark.parametrize(("kernel", "num_beams"), [("sdpa", 1), ("eager", 3)])
def test_generate_returns_the_scores_and_states_of_gpt2(pair, prompts, kernel, num_beams):
    names = ("scores", "logits", "hidden_states", "attentions")
    for model in pair:
        model.set_attn_implementation(kernel)
    outputs, reference_outputs = (
        texts(
            model,
            prompts,
            do_sample=False,
            num_beams=num_beams,
            return_dict_in_generate=True,
            **{f"output_{name}": True for name in names},
        )
        for model in pair
    )
    assert outputs.keys() == reference_outputs.keys()
    for name in names:
        actual, reference = (tree_flatten(each[name])[0] for each in (outputs, reference_outputs))
        assert len(actual) == len(reference) and (len(actual) >= 16) is (name != "attentions" or kernel == "eager")
        for a, b in zip(actual, reference, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_generation_continued_from_a_cache_gives_the_tokens_of_gpt2(pair, one_prompt):
    continuations = []
    for model in pair:
        first = texts(model, one_prompt, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([[1, 2, 3]])], dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        continuations += [texts(model, inputs, past_key_values=first.past_key_values, do_sample=False)]
        continuations += [texts(model, inputs, do_sample=False)]
    assert all(torch.equal(continuation, continuations[0]) for continuation in continuations[1:])


@pytest.mark.slow  # transformers' manager takes 10 seconds per model
def test_continuous_batching_gives_the_tokens_of_gpt2(pair, prompts):
    """Continuous batching packs prompts of different lengths into one row and uses a paged cache."""
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(*prompts.values(), strict=True)]
    settings = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=999)
    rows_of_tokens, reference_rows = (
        [result.generated_tokens for result in model.generate_batch(inputs=rows, generation_config=settings).values()]
        for model in pair
    )
    if not reference_rows:
        pytest.skip("this transformers (5.9, for example) fails for its own GPT-2 too")
    assert len(rows_of_tokens) == 3 and all(len(tokens) == 5 for tokens in rows_of_tokens)
    assert rows_of_tokens == reference_rows


def test_generation_from_embeddings_equals_generation_from_ids(model, prompts):
    embeds = model.get_input_embeddings()(prompts["input_ids"])
    mask = {"attention_mask": prompts["attention_mask"]}
    continuation = texts(model, {"inputs_embeds": embeds, **mask}, do_sample=False)
    assert torch.equal(continuation, texts(model, prompts, do_sample=False)[:, 8:])


@pytest.mark.parametrize("assistant", ["a smaller model", "the prompt itself"])
def test_assisted_decoding_gives_the_greedy_tokens(model, one_prompt, assistant):
    if assistant == "a smaller model":
        torch.manual_seed(1)
        config = GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=64, vocab_size=1000)
        helper = {"assistant_model": GPT2ReproForCausalLM.from_gpt2(GPT2LMHeadModel(config)).eval()}
    else:
        helper = {"prompt_lookup_num_tokens": 3}
    assert torch.equal(texts(model, one_prompt, do_sample=False, **helper), texts(model, one_prompt, do_sample=False))


@torch.no_grad()
@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_prefill_and_decode_equal_one_forward(model, input_ids, cache_class):
    input_ids = input_ids % 1000
    cache = DynamicCache() if cache_class is DynamicCache else StaticCache(config=model.config, max_cache_len=60)
    pieces = input_ids.split([30, 1, 1, 10, 1, 5], dim=1)  # prompt, single tokens and chunks
    logits = [model(piece, past_key_values=cache, use_cache=True).logits for piece in pieces]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(input_ids).logits, atol=1e-5, rtol=1e-5)


def test_compiled_static_cache_gives_the_same_tokens(pair, prompts):
    """All decoding steps of all texts use one full graph, if they get caches of one size.

    On a CPU, generate() compiles only with _compile_all_devices.
    """
    torch._dynamo.reset()
    model, gpt2 = pair
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    settings = CompileConfig(fullgraph=True, backend=backend, mode=None)
    settings._compile_all_devices = True
    arguments = {"cache_implementation": "static", "max_cache_len": 64, "compile_config": settings}
    longer = {name: tensor.repeat(1, 2) for name, tensor in prompts.items()}
    for inputs in (prompts, longer):
        compiled = texts(model, inputs, do_sample=False, **arguments)
        assert len(graphs) == 1
        assert torch.equal(compiled, texts(gpt2, inputs, do_sample=False))


def test_generation_beyond_n_positions_is_refused(model, prompts):
    with pytest.raises(ValueError, match="n_positions=64"):
        model.generate(**prompts, max_new_tokens=80, do_sample=False, pad_token_id=999, eos_token_id=None)
