"""Test which published results are shown: only those that can be compared."""

import pytest

from eval.hellaswag.task import Task
from eval.items import DataInfo
from eval.published import GPT2, find_corpus, published_lines
from eval.task import LoadedTask
from modeling_gpt2repro import GPT2ReproConfig
from modeling_gpt2repro.configuration_gpt2repro import SIZES


def test_published_lines_match_size_corpus_and_items():
    hellaswag, sample, part = (
        LoadedTask(Task(), [None] * n, DataInfo(description="", sha256="", is_sample=is_sample))
        for n, is_sample in ((10_042, False), (40, True), (100, False))
    )
    losses, scores = published_lines(GPT2ReproConfig(), {"dataset": "HuggingFaceFW/fineweb-edu"}, hellaswag)
    assert losses == {"OpenAI GPT-2 124M": 3.2924}
    assert scores == {"OpenAI GPT-2 124M": 0.2955, "GPT-3 125M": 0.337}
    assert published_lines(GPT2ReproConfig(), {"dataset": "kjj0/fineweb10B-gpt2"}, None) == (
        {"OpenAI GPT-2 124M": 3.425},
        {},
    )
    assert published_lines(GPT2ReproConfig(), {"paths": ["my.txt"]}, hellaswag)[0] == {}
    assert published_lines(GPT2ReproConfig(n_layer=3), None, hellaswag) == ({}, {})
    assert published_lines(GPT2ReproConfig(), None, sample)[1] == {}
    assert published_lines(GPT2ReproConfig(), None, part)[1] == {}


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
