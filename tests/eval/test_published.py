"""Test which published results are shown: only those that can be compared."""

import pytest

from eval.hellaswag.task import Task
from eval.items import DataInfo
from eval.lambada.task import Task as Lambada
from eval.published import GPT2, find_corpus, reference_lines
from eval.task import LoadedTask
from modeling_gpt2repro import GPT2ReproConfig
from modeling_gpt2repro.configuration_gpt2repro import SIZES


def lines(*args):
    return reference_lines(*args, is_gpt2_tokenizer=True)


def test_reference_lines_match_size_corpus_and_items():
    hellaswag, sample, part = (
        LoadedTask(Task(), [None] * n, DataInfo(description="", sha256="", is_sample=is_sample))
        for n, is_sample in ((10_042, False), (40, True), (100, False))
    )
    lambada = LoadedTask(Lambada(), [None] * 5153, DataInfo(description="", sha256=""))
    tasks, config, edu = [hellaswag, lambada], GPT2ReproConfig(), {"dataset": "HuggingFaceFW/fineweb-edu"}
    chance = {"hellaswag": {"chance": 0.25}}
    losses, scores = lines(config, edu, tasks)
    assert losses == {"OpenAI GPT-2 124M": 3.2924}
    assert scores["hellaswag"] == {"chance": 0.25, "OpenAI GPT-2 124M": 0.2955, "GPT-3 125M": 0.337}
    assert scores["lambada"] == {"OpenAI GPT-2 124M": 0.3256}
    assert lines(config, {"dataset": "kjj0/fineweb10B-gpt2"}, []) == ({"OpenAI GPT-2 124M": 3.425}, {})
    assert lines(config, {"paths": ["my.txt"]}, tasks)[0] == {}
    assert lines(GPT2ReproConfig(n_layer=3), None, [hellaswag]) == ({}, chance)
    assert lines(config, None, [sample])[1] == lines(config, None, [part])[1] == chance
    assert reference_lines(config, edu, [hellaswag], is_gpt2_tokenizer=False) == ({}, chance)


@pytest.mark.parametrize(
    ("source", "corpus"),
    [
        ("shards/fineweb_edu", "fineweb-edu"),
        ("kjj0/finewebedu10B-gpt2", "fineweb-edu"),
        ("FineWeb_Edu_10B", "fineweb-edu"),
        ("edu_fineweb10B", "fineweb-edu"),
        ("kjj0/fineweb10B-gpt2", "fineweb"),
        ("HuggingFaceFW/fineweb-2", None),
        ("Skylion007/openwebtext", "openwebtext"),
        ("fineweb/openwebtext", None),
        ("openwebtext2", None),
    ],
)
def test_corpus_is_recognized_by_its_name(source, corpus):
    assert find_corpus(source) == corpus


def test_names_shapes_and_parameters_match_the_model_configs():
    for model, size in zip(GPT2, SIZES, strict=True):
        config = GPT2ReproConfig.from_size(size)
        assert model.name.endswith(f" {size}")
        assert model.size == (config.n_layer, config.n_embd)
        block = 12 * config.n_embd**2 + 13 * config.n_embd
        embeddings = (config.vocab_size + config.n_positions) * config.n_embd
        assert model.parameters == config.n_layer * block + embeddings + 2 * config.n_embd
