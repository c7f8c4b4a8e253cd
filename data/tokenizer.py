"""
GPT-2's byte-level BPE (50,000 merges, 256 bytes, `<|endoftext|>`), without a download.

tiktoken and transformers download OpenAI's two vocabulary files, vocab.bpe and encoder.json, at first use. vocab.bpe is
in this folder (vocab.bpe.LICENSE names its source) and holds all of it: encoder.json numbers the 256 bytes, the merges
and `<|endoftext|>` in this order. Both tokenizers are built from it. The SHA-256 values of both files are the ones in
tiktoken's own source (tiktoken_ext/openai_public.py).
"""

import hashlib
import importlib.util
import json
import re
from functools import cache
from pathlib import Path

import numpy as np

from data import DataError

VOCAB_SIZE = 50257
EOT = 50256
EOT_TEXT = "<|endoftext|>"
VOCAB_BPE = Path(__file__).with_name("vocab.bpe")
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"

# vocab.bpe writes each byte as a printable character: itself if it is printable, otherwise one from chr(256) on. In the
# order of the bytes' ids, the printable ones come first.
_PRINTABLE = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
_NOT_PRINTABLE = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(_NOT_PRINTABLE)}

# How GPT-2 cuts text before the merges: contractions, words, numbers, other signs (each with the space before it),
# white space. From OpenAI's encoder.py, with the possessive quantifiers that tiktoken uses for the same result.
SPLIT_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

# tiktoken panics (StackOverflow, in Rust) on a million white-space characters before another character, since
# `\s+(?!\S)` remembers a place to go back to for each. Unicode's White_Space, which `\s` means there and not here.
_WHITE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
_LONG_WHITE = 100_000
_LONG_WHITE_RUN = re.compile(rf"(?<!{_WHITE}){_WHITE}{{{_LONG_WHITE},}}+(?!\Z)")

# No piece of SPLIT_PATTERN goes over the place between a letter and the white space after it.
_PIECE_END = re.compile(r"[A-Za-z](?=[ \n])")
_PIECE_CHARACTERS = 1_000_000

TOKENIZER_BACKENDS = ("tiktoken", "gigatoken")
_EOT_ARRAY = np.array([EOT], dtype=np.uint32)


@cache
def load_merges() -> list[tuple[str, str]]:
    """
    Read vocab.bpe: the 50,000 merges as pairs, first merge first.

    Raises:
        DataError: the file is missing, or is not GPT-2's.
    """
    remedy = f"restore it with `git checkout {VOCAB_BPE.parent.name}/{VOCAB_BPE.name}`, or clone the project again"
    try:
        content = VOCAB_BPE.read_bytes()
    except OSError as error:
        raise DataError(f"GPT-2's vocabulary {str(VOCAB_BPE)!r} cannot be read ({error.strerror}): {remedy}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != VOCAB_BPE_SHA256:
        raise DataError(
            f"{str(VOCAB_BPE)!r} is not GPT-2's vocabulary: SHA-256 {found}, expected {VOCAB_BPE_SHA256}; {remedy}"
        )
    _version, *lines = content.decode().splitlines()
    return [tuple(line.split(" ")) for line in lines]


def load_vocabulary() -> dict[str, int]:
    """Return {token: id} in the order of ids; `json.dumps` of it is encoder.json, byte for byte."""
    tokens = [*_BYTE_OF, *map("".join, load_merges()), EOT_TEXT]
    return {token: number for number, token in enumerate(tokens)}


def tokenizer_sha256():
    """Identifies the vocabulary in manifests: a hash over the two files' hashes."""
    return hashlib.sha256(f"{VOCAB_BPE_SHA256} {ENCODER_JSON_SHA256}".encode()).hexdigest()


@cache
def load_tiktoken():
    """
    The fast one. `encode_ordinary` takes `<|endoftext|>` in a text for plain characters, as documents want it;
    for documents of any kind see `encode_document`.

    Returns:
        tiktoken.Encoding named "gpt2", equal to tiktoken.get_encoding("gpt2").
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


def check_backend(backend):
    """
    Raises:
        DataError: as `load_encoder` would, without its cost.
    """
    if backend not in TOKENIZER_BACKENDS:
        raise DataError(f"no tokenising backend {backend!r}; give one of {', '.join(TOKENIZER_BACKENDS)}")
    if importlib.util.find_spec(backend) is None:
        raise DataError(f'the backend {backend} is not installed: pip install -e ".[fast]"')
    load_merges()


@cache
def load_encoder(backend="tiktoken"):
    """
    Args:
        backend: "tiktoken", or "gigatoken" (the extra `fast`): the same ids, several times as fast.

    Returns:
        function str -> [N] array of token ids, for which `<|endoftext|>` is plain characters.

    Raises:
        DataError: the backend's package is missing, or there is no such backend.
    """
    check_backend(backend)
    if backend == "tiktoken":
        encoding = load_tiktoken()
        return lambda text: encoding.encode_to_numpy(text, disallowed_special=())
    from gigatoken import Tokenizer

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    description = {  # a tokenizer.json without special tokens, which gigatoken would find in a text
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": load_vocabulary(), "merges": load_merges()},
    }
    return Tokenizer.from_json(json.dumps(description)).encode


def encode_document(text, backend="tiktoken"):
    """
    Args:
        text: a whole document; `<|endoftext|>` in it is plain characters.
        backend: see `load_encoder`.

    Returns:
        [N] uint16 array of token ids that begins with EOT.
    """
    encode, parts = load_encoder(backend), [_EOT_ARRAY]
    for begin, end in _pieces(text):
        piece, start = text[begin:end], 0
        # Cut before the last character of a long run, where SPLIT_PATTERN ends a piece anyway: the same tokens.
        for run in _LONG_WHITE_RUN.finditer(piece) if len(piece) > _LONG_WHITE else ():
            parts.append(encode(piece[start : run.end() - 1]))
            start = run.end() - 1
        parts.append(encode(piece[start:]))
    return np.concatenate(parts, dtype=np.uint16, casting="unsafe")


def _pieces(text):
    """(begin, end) of parts of a long text that have the text's own tokens, so that memory stays small."""
    begin = 0
    while len(text) - begin > _PIECE_CHARACTERS:
        cut = _PIECE_END.search(text, begin + _PIECE_CHARACTERS)
        if cut is None:
            break
        yield begin, cut.end()
        begin = cut.end()
    yield begin, len(text)


def load_hf_tokenizer(model_max_length=1024):
    """
    The one that goes with a checkpoint. `tokenizer(text)` makes `<|endoftext|>` in a text the special token;
    with `split_special_tokens=True` it is plain characters, as for tiktoken's `encode_ordinary`.

    Args:
        model_max_length: the model's n_positions.

    Returns:
        transformers.GPT2TokenizerFast.
    """
    from transformers import GPT2TokenizerFast

    return GPT2TokenizerFast(
        vocab=load_vocabulary(),
        merges=load_merges(),
        unk_token=EOT_TEXT,
        bos_token=EOT_TEXT,
        eos_token=EOT_TEXT,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )
