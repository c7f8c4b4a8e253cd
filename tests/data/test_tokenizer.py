import hashlib
import json
import shutil
import subprocess
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_run import ROOT
from transformers import AutoTokenizer

from data import DataError, tokenizer
from data.tokenizer import EOT, GPT2, VOCAB_SIZE, load_tiktoken, open_tokenizer

# All of Unicode (hypothesis omits surrogates, which UTF-8 cannot have), and texts that are hard for tokenizers.
PIECES = st.one_of(
    st.text(max_size=20),
    st.text(alphabet=st.characters(categories=["Cc", "Cf", "Co", "Zs", "Zl", "Zp"]), max_size=10),
    st.sampled_from(
        ["<|endoftext|>", "'s", "'LL", " 're", "\n\n\n", "\t ", "  ", "é", "e\u0301", "👩‍👩‍👧", "𝔘", "\x00", "½"]
    ),
    st.builds(lambda c, n: c * n, st.characters(codec="utf-8"), st.integers(1, 300)),
)
TEXTS = st.lists(PIECES, max_size=6).map("".join)


@pytest.fixture(scope="module")
def both():
    return load_tiktoken(), GPT2.hf()


def on_any_text(max_examples):
    """Run the test on this many examples of TEXTS, and on texts that are known to be hard."""

    def decorate(test):
        for text in ("", "<|endoftext|>", " " * 1000, "a" * 5000, "".join(map(chr, range(256)))):
            test = example(text=text)(test)
        return settings(max_examples=max_examples, deadline=None)(given(text=TEXTS)(test))

    return decorate


@on_any_text(400)
def test_tiktoken_and_transformers_agree(both, text):
    encoding, hf = both
    ordinary = encoding.encode_ordinary(text)
    assert hf(text, split_special_tokens=True)["input_ids"] == ordinary
    special = encoding.encode(text, allowed_special="all")
    assert hf(text)["input_ids"] == special
    assert encoding.decode(ordinary) == hf.decode(ordinary) == text
    assert all(0 <= token < VOCAB_SIZE - 1 for token in ordinary)


@on_any_text(300)
def test_gigatoken_agrees(both, text):
    pytest.importorskip("gigatoken")
    text = text.encode("utf-8", "replace").decode()  # as in decode_record
    assert replace(GPT2, backend="gigatoken").encode(text).tolist() == both[0].encode_ordinary(text)


def test_tokenizer_backends_agree_on_real_text(both, sample):
    pytest.importorskip("gigatoken")
    for text in sample:
        expected = [EOT, *both[0].encode_ordinary(text)]
        assert GPT2.encode_document(text).tolist() == expected
        assert open_tokenizer(backend="gigatoken").encode_document(text).tolist() == expected


@settings(max_examples=200, deadline=None)
@given(
    text=TEXTS,
    words=st.lists(st.sampled_from(["word ", "two\n", "  ", "x", "\u2003", "\n\n", "'s ", "9 "]), max_size=60),
)
def test_long_documents_are_encoded_in_pieces_with_the_same_tokens(both, text, words):
    text = "".join(words) + text + "".join(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "_PIECE_CHARACTERS", 5)
        assert GPT2.encode_document(text).tolist() == [EOT, *both[0].encode_ordinary(text)]


def test_missing_backend_is_an_error(monkeypatch):
    monkeypatch.setattr(tokenizer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install -e \"\.\[fast\]\""):
        open_tokenizer(backend="gigatoken")


def test_ids_are_the_published_ones(both):
    """GPT-2's published ids: the lecture's prompt, and the special token."""
    encoding, hf = both
    assert encoding.encode_ordinary("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert encoding.n_vocab == len(hf) == VOCAB_SIZE
    assert encoding.encode("<|endoftext|>", allowed_special="all") == hf("<|endoftext|>")["input_ids"] == [EOT]
    assert hf.bos_token_id == hf.eos_token_id == EOT


def test_saved_tokenizer_opens_with_the_same_ids(tmp_path, both):
    text = "The café's <|endoftext|> 12345\n\n  naïve 👩‍👩‍👧"
    GPT2.hf(model_max_length=77).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded(text)["input_ids"], loaded.model_max_length) == (both[1](text)["input_ids"], 77)


def test_both_vocabulary_files_are_the_published_ones():
    """Every one of the 50,000 merges and 50,257 ids; the hashes are copied from tiktoken."""
    merges = "".join(f"{a} {b}\n" for a, b in tokenizer.load_merges())
    files = ("#version: 0.2\n" + merges, json.dumps(tokenizer.load_vocabulary()))
    assert [hashlib.sha256(content.encode()).hexdigest() for content in files] == [
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    ]
    # Existing manifests have this value; with another one `train.py` would refuse their shards.
    assert GPT2.sha256 == "816e3298739be1e8c8d5d4ad6b5bcdf8b349e10ff6daa3e9df1c0a2729dabd9d"


def test_vocabulary_survives_a_checkout_with_windows_line_ends():
    """Git for Windows turns \\n into \\r\\n in text files; .gitattributes keeps it from vocab.bpe."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-c", "core.autocrlf=true", "-c", "core.eol=crlf", "cat-file", "--filters", ":data/vocab.bpe"]
    checked_out = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=60).stdout
    assert checked_out == tokenizer.VOCAB_BPE.read_bytes()


@pytest.mark.parametrize("damage", [None, b"", b"#version: 0.2\r\n"], ids=["missing", "empty", "other line ends"])
def test_damaged_vocabulary_is_refused_with_the_remedy(damage, tmp_path, monkeypatch):
    path = tmp_path / "vocab.bpe"
    if damage is not None:
        path.write_bytes(damage)
    monkeypatch.setattr(tokenizer, "VOCAB_BPE", path)
    tokenizer.load_merges.cache_clear()
    try:
        with pytest.raises(DataError, match=r"vocab\.bpe.*restore it with `git checkout"):
            tokenizer.load_merges()
    finally:
        tokenizer.load_merges.cache_clear()
