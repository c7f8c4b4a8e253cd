"""GPT-2's byte-level BPE (50,000 merges, 256 bytes, `<|endoftext|>`), without a download.

tiktoken and transformers download OpenAI's two vocabulary files, vocab.bpe and encoder.json, at first use. vocab.bpe is
in this folder (vocab.bpe.LICENSE names its source), and encoder.json follows from it: it numbers the 256 bytes, the
merges and `<|endoftext|>` in this order. Both tokenizers are built from vocab.bpe. The SHA-256 values of both files are
those in tiktoken's source (tiktoken_ext/openai_public.py).
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data import DataError

if TYPE_CHECKING:
    import tiktoken
    from transformers import GPT2Tokenizer

VOCAB_SIZE = 50257
EOT = 50256
EOT_TEXT = "<|endoftext|>"
VOCAB_BPE = Path(__file__).with_name("vocab.bpe")
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"

# vocab.bpe writes each byte as a printable character: itself if it is printable, otherwise one from chr(256) on. The
# printable bytes have the first ids.
_PRINTABLE = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
_NOT_PRINTABLE = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(_NOT_PRINTABLE)}

# GPT-2's pre-tokenization: contractions, words, numbers, other characters (each with the space before it), white space.
# From OpenAI's encoder.py, with the possessive quantifiers that tiktoken uses for the same result.
SPLIT_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

# tiktoken panics (StackOverflow, in Rust) on a million white-space characters before another character, since
# `\s+(?!\S)` keeps a backtracking position for each. In Rust `\s` means Unicode's White_Space, in Python it does not.
_WHITE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
_LONG_WHITE = 100_000
_LONG_WHITE_RUN = re.compile(rf"(?<!{_WHITE}){_WHITE}{{{_LONG_WHITE},}}+(?!\Z)")

# No match of SPLIT_PATTERN spans a letter and the white space after it.
_PIECE_END = re.compile(r"[A-Za-z](?=[ \n])")
_PIECE_CHARACTERS = 1_000_000

TOKENIZER_BACKENDS = ("tiktoken", "gigatoken")
_EOT_ARRAY = np.array([EOT], dtype=np.uint32)


@cache
def load_merges() -> list[tuple[str, str]]:
    """Read vocab.bpe: the 50,000 merges as pairs, in order. Raises DataError if the file is missing or not GPT-2's."""
    remedy = f"restore it with `git checkout {VOCAB_BPE.parent.name}/{VOCAB_BPE.name}`, or clone the project again"
    try:
        content = VOCAB_BPE.read_bytes()
    except OSError as error:
        raise DataError(f"GPT-2's vocabulary {str(VOCAB_BPE)!r} cannot be read ({error.strerror}): {remedy}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != VOCAB_BPE_SHA256:
        raise DataError(
            f"{str(VOCAB_BPE)!r} is not GPT-2's vocabulary: SHA-256 {digest}, expected {VOCAB_BPE_SHA256}; {remedy}"
        )
    _version, *lines = content.decode().splitlines()
    merges = [line.split(" ") for line in lines]
    return [(first, second) for first, second in merges]


def load_vocabulary() -> dict[str, int]:
    """Return {token: id} in the order of ids; `json.dumps` of it is encoder.json, byte for byte."""
    tokens = [*_BYTE_OF, *map("".join, load_merges()), EOT_TEXT]
    return {token: number for number, token in enumerate(tokens)}


def tokenizer_sha256() -> str:
    """Return the hash that identifies the vocabulary in manifests: a hash over the two files' hashes."""
    return hashlib.sha256(f"{VOCAB_BPE_SHA256} {ENCODER_JSON_SHA256}".encode()).hexdigest()


@cache
def load_tiktoken() -> "tiktoken.Encoding":
    """Build tiktoken's encoding "gpt2", equal to tiktoken.get_encoding("gpt2").

    Its `encode_ordinary` treats `<|endoftext|>` in a text as plain characters. Use `encode_document` for documents.
    """
    import tiktoken

    vocabulary = load_vocabulary()
    del vocabulary[EOT_TEXT]
    ranks = {bytes(_BYTE_OF[character] for character in token): rank for token, rank in vocabulary.items()}
    return tiktoken.Encoding(
        "gpt2",
        pat_str=SPLIT_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={EOT_TEXT: EOT},
        explicit_n_vocab=VOCAB_SIZE,
    )


def check_backend(backend: str) -> None:
    """Raise DataError unless a tokenizer backend and the vocabulary are installed; loads neither."""
    if backend not in TOKENIZER_BACKENDS:
        raise DataError(f"tokenizer_backend must be one of {', '.join(TOKENIZER_BACKENDS)}, got {backend!r}")
    if importlib.util.find_spec(backend) is None:
        raise DataError(f'the tokenizer backend {backend} is not installed: pip install -e ".[fast]"')
    load_merges()


@cache
def load_encoder(backend: str = "tiktoken") -> Callable[[str], np.ndarray]:
    """Load the function that encodes text: str -> [N] token ids. It treats `<|endoftext|>` as plain characters.

    Args:
        backend: "tiktoken", or "gigatoken" (the extra `fast`), which gives the same ids several times as fast.
    """
    check_backend(backend)
    if backend == "tiktoken":
        encoding = load_tiktoken()
        return lambda text: encoding.encode_to_numpy(text, disallowed_special=())
    from gigatoken import Tokenizer

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    description = {  # a tokenizer.json without special tokens, which gigatoken would recognize in a text
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": load_vocabulary(), "merges": load_merges()},
    }
    return Tokenizer.from_json(json.dumps(description)).encode


def encode_document(text: str, backend: str = "tiktoken") -> np.ndarray:
    """Encode a document of any length: EOT, then the tokens of the text, [N] uint16; see `load_encoder`."""
    encode, parts = load_encoder(backend), [_EOT_ARRAY]
    for begin, end in _pieces(text):
        piece, start = text[begin:end], 0
        # Cut before the last character of a long run, where a match of SPLIT_PATTERN ends anyway: the same tokens.
        for run in _LONG_WHITE_RUN.finditer(piece) if len(piece) > _LONG_WHITE else ():
            parts.append(encode(piece[start : run.end() - 1]))
            start = run.end() - 1
        parts.append(encode(piece[start:]))
    return np.concatenate(parts, dtype=np.uint16, casting="unsafe")


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    """Split a long text, to save memory, into (begin, end) pieces whose tokens together are the tokens of the text."""
    begin = 0
    while len(text) - begin > _PIECE_CHARACTERS:
        cut = _PIECE_END.search(text, begin + _PIECE_CHARACTERS)
        if cut is None:
            break
        yield begin, cut.end()
        begin = cut.end()
    yield begin, len(text)


def load_hf_tokenizer(model_max_length: int = 1024) -> "GPT2Tokenizer":
    """Build the Hugging Face tokenizer that is saved with checkpoints.

    `tokenizer(text)` encodes `<|endoftext|>` in a text as the special token. With `split_special_tokens=True` it is
    plain characters, as in tiktoken's `encode_ordinary`.

    Args:
        model_max_length: the model's n_positions.
    """
    from transformers import GPT2Tokenizer

    return GPT2Tokenizer(
        vocab=load_vocabulary(),
        merges=load_merges(),  # type: ignore[arg-type]  # pairs, whatever its annotation says
        unk_token=EOT_TEXT,
        bos_token=EOT_TEXT,
        eos_token=EOT_TEXT,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )
