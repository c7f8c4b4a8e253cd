"""The sample recipe's losses, to the digits that another processor's order of summing leaves."""

import json
import platform

import pytest
from golden_losses import FILE, corpus_sha256, first_losses, write_seeded_corpus
from tiny_run import clean_environment

GOLDEN = json.loads(FILE.read_text())


def test_seeded_corpus(tmp_path):
    write_seeded_corpus(tmp_path / "seeded")
    losses = first_losses(tmp_path / "seeded", tmp_path / "run", clean_environment(tmp_path))
    assert losses == pytest.approx(GOLDEN["seeded"]["losses"], abs=2e-5)


def test_sample_corpus(tmp_path):
    losses = first_losses(tmp_path / "sample", tmp_path / "run", clean_environment(tmp_path))
    corpus = corpus_sha256(tmp_path / "sample")
    for entry in GOLDEN["sample"]:
        if entry["corpus_sha256"] == corpus:
            assert losses == pytest.approx(entry["losses"], abs=2e-5)
            return
    pytest.skip(f"no golden losses for the text of Python {platform.python_version()}: run tests/golden_losses.py")
