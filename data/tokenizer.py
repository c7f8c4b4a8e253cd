"""Tokenizers: GPT-2's byte-level BPE, the default, and any fast tokenizer of transformers.

GPT-2's has 50,000 merges, 256 bytes and `<|endoftext|>`. tiktoken and transformers download OpenAI's two vocabulary
files, vocab.bpe and encoder.json, at first use. vocab.bpe is in this folder (vocab.bpe.LICENSE names its source), and
encoder.json follows from it: it numbers the 256 bytes, the merges and `<|endoftext|>` in this order. The SHA-256 values
of both files are those in tiktoken's source (tiktoken_ext/openai_public.py).

    python -m data.tokenizer train FILES --vocab_size 16384 --out DIR      make one (data/train_tokenizer.py)
"""

import hashlib
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from common.checkpoints import has_tokenizer, is_local, resolve_checkpoint
from common.errors import UserError, one_line
from data import DataError

if TYPE_CHECKING:
    import tiktoken
    from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 50257
EOT = 50256
EOT_TEXT = "<|endoftext|>"
_GPT2_NAMES = ("gpt2", "openai-community/gpt2")
VOCAB_BPE = Path(__file__).with_name("vocab.bpe")
_VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
_ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"

# vocab.bpe writes each byte as a printable character: itself if it is printable, otherwise one from chr(256) on. The
# printable bytes have the first ids.
_PRINTABLE = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
_NOT_PRINTABLE = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(_NOT_PRINTABLE)}

# GPT-2's pre-tokenization: contractions, words, numbers, other characters (each with the space before it), white space.
# From OpenAI's encoder.py, with the possessive quantifiers that tiktoken uses for the same result.
_SPLIT_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

# tiktoken panics (StackOverflow, in Rust) on a million white-space characters before another character, since
# `\s+(?!\S)` keeps a backtracking position for each. In Rust `\s` means Unicode's White_Space, in Python it does not.
_WHITE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
_LONG_WHITE = 100_000
_LONG_WHITE_RUN = re.compile(rf"(?<!{_WHITE}){_WHITE}{{{_LONG_WHITE},}}+(?!\Z)")

# No match of _SPLIT_PATTERN spans a letter and the white space after it, or a Chinese or Japanese letter and a comma.
_PIECE_END = re.compile(r"[^\W\d_](?=[ \n])|[\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff](?=[\u3001\u3002\uff0c])")
_PIECE_CHARACTERS = 1_000_000

TOKENIZER_BACKENDS = ("tiktoken", "gigatoken")


class Vocabulary(NamedTuple):
    """The facts about a tokenizer that reading shards needs."""

    size: int
    """number of token ids, the largest one + 1"""
    eos_id: int
    """the token that separates documents"""

    @property
    def dtype(self) -> np.dtype:
        """Type of the tokens in shards, little-endian."""
        return np.dtype("<u2" if self.size <= 2**16 else "<u4")


GPT2_VOCABULARY = Vocabulary(VOCAB_SIZE, EOT)


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A tokenizer of documents. Its fields are plain values, so it can be sent to worker processes.

    A document is the eos token and then the tokens of its text. Special tokens written in a text are plain characters,
    and none is added to it. A long text is encoded in pieces of about a million characters, so that memory stays flat.
    Pieces end where every match of GPT-2's pre-tokenization ends, so for GPT-2's and other byte-level BPEs their tokens
    are those of the text. A tokenizer that marks the beginning of a text (SentencePiece's, with a space) marks that of
    each piece: one or two other tokens per million characters.
    """

    name: str
    """as the user gave it"""
    eos_text: str
    """the token that separates documents"""
    pad_text: str | None = None
    unk_text: str | None = None
    definition: str = ""
    """content of tokenizer.json; "" for GPT-2's tokenizer"""
    backend: str = "tiktoken"
    """for GPT-2's tokenizer, one of TOKENIZER_BACKENDS with the same ids; others use the package tokenizers"""

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # without what the properties cache

    @property
    def is_gpt2(self) -> bool:
        """True for GPT-2's tokenizer."""
        return not self.definition

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Size and eos token."""
        if self.is_gpt2:
            return GPT2_VOCABULARY
        ids = self.ids()
        return Vocabulary(max(ids.values()) + 1, ids[self.eos_text])

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.vocabulary.size

    @cached_property
    def sha256(self) -> str:
        """Hash over tokenizer.json's content and the eos token, or over GPT-2's two files."""
        if self.is_gpt2:
            return hashlib.sha256(f"{_VOCAB_BPE_SHA256} {_ENCODER_JSON_SHA256}".encode()).hexdigest()
        content = json.dumps(plain_definition(self.definition), sort_keys=True)
        return hashlib.sha256(f"{content}\n{self.eos_text}".encode()).hexdigest()

    @cached_property
    def encode(self) -> Callable[[str], np.ndarray]:
        """The function that encodes a text: str -> [N] token ids."""
        if self.is_gpt2 and self.backend == "gigatoken":
            return _load_gigatoken()
        if self.is_gpt2:
            encoding = load_tiktoken()
            return lambda text: encoding.encode_to_numpy(text, disallowed_special=())
        fast = _load_fast(self.definition)
        return lambda text: np.array(fast.encode_batch_fast([text], add_special_tokens=False)[0].ids, dtype=np.uint32)

    def encode_document(self, text: str, starts: bool = True) -> np.ndarray:
        """Encode a document of any length: the eos token if it starts here, then the text; [N] of Vocabulary.dtype."""
        parts = [np.array([self.vocabulary.eos_id])] if starts else []
        for begin, end in pieces(text):
            piece, start = text[begin:end], 0
            # Cut before the last character of a long run, where a match of _SPLIT_PATTERN ends anyway: the same tokens.
            for run in _LONG_WHITE_RUN.finditer(piece) if len(piece) > _LONG_WHITE else ():
                parts.append(self.encode(piece[start : run.end() - 1]))
                start = run.end() - 1
            parts.append(self.encode(piece[start:]))
        return np.concatenate(parts, dtype=self.vocabulary.dtype, casting="unsafe")

    def byte_lengths(self) -> np.ndarray | None:
        """Return the number of UTF-8 bytes of each token, [V] uint16, 0 for special ones; None if not byte-level."""
        special = {EOT_TEXT}
        if not self.is_gpt2:
            definition = json.loads(self.definition)
            special = {token["content"] for token in definition["added_tokens"]}
            if "ByteLevel" not in json.dumps(definition["decoder"]):
                return None
        lengths = np.zeros(self.vocab_size, dtype=np.uint16)
        for token, number in self.ids().items():  # a byte-level tokenizer spells each byte of a token as one character
            lengths[number] = 0 if token in special else len(token)
        return lengths

    def hf(self, model_max_length: int = 1024) -> "PreTrainedTokenizerFast":
        """Build the tokenizer of transformers that checkpoints carry. Its bos token is the eos token, as GPT-2's.

        `tokenizer(text)` encodes `<|endoftext|>` in a text as the special token. With `split_special_tokens=True` it is
        plain characters, as in shards.
        """
        import tokenizers
        from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

        options: dict[str, Any] = {"model_max_length": model_max_length, "clean_up_tokenization_spaces": False}
        options |= {"bos_token": self.eos_text, "eos_token": self.eos_text}
        if self.is_gpt2:
            return GPT2Tokenizer(vocab=load_vocabulary(), merges=load_merges(), unk_token=EOT_TEXT, **options)
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(plain_definition(self.definition))),
            pad_token=self.pad_text,
            unk_token=self.unk_text,
            model_input_names=["input_ids", "attention_mask"],
            **options,
        )

    def config_fields(self) -> dict[str, int | None]:
        """Return the fields of a model's config that follow from the tokenizer."""
        size, eos_id = self.vocabulary
        pad_id = None if self.pad_text is None else self.ids()[self.pad_text]
        return {"vocab_size": size, "bos_token_id": eos_id, "eos_token_id": eos_id, "pad_token_id": pad_id}

    def ids(self) -> dict[str, int]:
        """Return {token: id}."""
        return load_vocabulary() if self.is_gpt2 else _load_fast(self.definition).get_vocab()

    def save(self, folder: str | Path) -> dict[str, str]:
        """Replace a folder by the files of `hf`. Return {file name: SHA-256}; GPT-2's has none, its name is enough."""
        if self.is_gpt2:
            return {}
        folder = Path(folder)
        tmp_path = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(tmp_path, ignore_errors=True)  # of a killed process
        try:
            self.hf().save_pretrained(tmp_path)
            shutil.rmtree(folder, ignore_errors=True)
            tmp_path.rename(folder)
        finally:
            shutil.rmtree(tmp_path, ignore_errors=True)
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


GPT2 = Tokenizer(name="gpt2", eos_text=EOT_TEXT)


def open_tokenizer(name: str | None = None, *, eos_token: str | None = None, backend: str = "tiktoken") -> Tokenizer:
    """Return GPT-2's tokenizer (None or "gpt2"), offline, or any fast tokenizer of transformers.

    Args:
        name: a folder (a checkpoint's, or one of `python -m data.tokenizer train`), or an id on the Hub. As in
            transformers, a folder with a tokenizer comes first, also one called gpt2.
        eos_token: the token that separates documents, for a tokenizer that has no eos token.
        backend: for GPT-2's, one of TOKENIZER_BACKENDS.

    Raises:
        UserError: it cannot be opened, is not a fast one, or has no eos token; the backend is not available.
    """
    if name in _GPT2_NAMES and has_tokenizer(name):
        name = f"./{name}"  # in a manifest, the plain name means GPT-2's
    tokenizer = GPT2 if name is None or name in _GPT2_NAMES else _open_transformers(name, eos_token)
    if not tokenizer.is_gpt2:
        if backend != "tiktoken":
            raise DataError(f"--tokenizer_backend {backend} is for GPT-2's tokenizer, not {name!r}; drop one")
        return tokenizer
    if eos_token not in (None, EOT_TEXT):
        raise DataError(f"--eos_token must be {EOT_TEXT} for GPT-2's tokenizer, got {eos_token!r}; leave it out")
    if importlib.util.find_spec(backend) is None:
        raise DataError(f'the tokenizer backend {backend} is not installed: pip install -e ".[fast]"')
    load_merges()  # which checks the file
    return replace(GPT2, backend=backend)


def check_same_tokenizer(checkpoint: str, tokenizer: Tokenizer) -> None:
    """Raise DataError unless a checkpoint's tokenizer is that of the shards, perhaps with tokens added to it.

    A checkpoint without a tokenizer is one of GPT-2's.
    """
    try:
        other = open_tokenizer(checkpoint)
    except UserError:
        has_own = has_tokenizer(resolve_checkpoint(checkpoint))
        other = open_tokenizer(checkpoint, eos_token=tokenizer.eos_text) if has_own else GPT2
    if other.sha256 != tokenizer.sha256 and not tokenizer.ids().items() <= other.ids().items():
        raise DataError(
            f"{checkpoint} has another tokenizer ({other.vocab_size:,} tokens) than the shards ({tokenizer.name}, "
            f"{tokenizer.vocab_size:,} tokens): prepare the text with --tokenizer {checkpoint}, or train from scratch"
        )


def _open_transformers(name: str, eos_token: str | None) -> Tokenizer:
    from transformers import AutoTokenizer

    from common.models import from_pretrained  # which imports torch

    path = resolve_checkpoint(name)
    if Path(path).is_file():
        raise DataError(f"--tokenizer {name!r} is a file; give the folder that it is in")
    if is_local(path) and not has_tokenizer(path):
        raise DataError(f"--tokenizer {name!r} has no tokenizer.json; give a folder that save_pretrained has written")
    original: Any = from_pretrained(AutoTokenizer, path, kind="tokenizer")
    if not getattr(original, "is_fast", False) or not hasattr(original, "backend_tokenizer"):
        raise DataError(f"--tokenizer {name!r} is not fast ({type(original).__name__}): name one with a tokenizer.json")
    eos = eos_token or original.eos_token
    if eos is None:
        known = " ".join(original.all_special_tokens) or "none"
        raise DataError(
            f"--tokenizer {name!r} has no eos token to separate documents with: give one of its tokens with "
            f"--eos_token (its special tokens: {known})"
        )
    if original.backend_tokenizer.token_to_id(eos) is None:
        raise DataError(f"--eos_token {eos!r} is not a token of {name!r}")
    definition = original.backend_tokenizer.to_str()
    return make_tokenizer(name, definition, eos, original.pad_token, original.unk_token)


def make_tokenizer(
    name: str, definition: str, eos: str = EOT_TEXT, pad: str | None = None, unk: str | None = None
) -> Tokenizer:
    """Make a tokenizer from the content of a tokenizer.json and the names of its special tokens."""
    tokenizer = Tokenizer(name=name, eos_text=eos, pad_text=pad, unk_text=unk, definition=definition)
    try:
        content = plain_definition(tokenizer.hf().backend_tokenizer.to_str())
    except Exception as error:  # the package tokenizers raises plain Exceptions
        raise DataError(f"--tokenizer {name!r} cannot be used ({one_line(error)})") from error
    if _is_gpt2(content, eos):
        return GPT2
    return replace(tokenizer, definition=json.dumps(content, ensure_ascii=False))


def plain_definition(definition: str) -> dict[str, Any]:
    """Return a tokenizer.json without what depends on its use: truncation, padding, tokens added around a text."""
    return json.loads(definition) | {"truncation": None, "padding": None, "post_processor": None}


@cache
def _load_fast(definition: str) -> Any:
    import tokenizers

    fast = tokenizers.Tokenizer.from_str(definition)
    fast.encode_special_tokens = True  # special tokens written in a text are plain characters
    return fast


def _is_gpt2(definition: dict[str, Any], eos: str) -> bool:
    """Return True if a tokenizer gives the same ids as GPT-2's, whatever its name."""
    model, split = definition["model"], definition["pre_tokenizer"] or {}
    return (
        (eos, model["type"], definition["normalizer"]) == (EOT_TEXT, "BPE", None)
        and (split.get("type"), split.get("add_prefix_space"), split.get("use_regex")) == ("ByteLevel", False, True)
        and [token["id"] for token in definition["added_tokens"]] == [EOT]
        and model["vocab"] == load_vocabulary()
        and [tuple(merge) for merge in model["merges"]] == load_merges()
    )


@cache
def load_merges() -> list[Any]:
    """Read vocab.bpe: the 50,000 merges as pairs, in order. Raises DataError if the file is missing or not GPT-2's."""
    remedy = f"restore it with `git checkout {VOCAB_BPE.parent.name}/{VOCAB_BPE.name}`, or clone the project again"
    try:
        content = VOCAB_BPE.read_bytes()
    except OSError as error:
        raise DataError(f"GPT-2's vocabulary {str(VOCAB_BPE)!r} cannot be read ({error.strerror}): {remedy}") from error
    if (digest := hashlib.sha256(content).hexdigest()) != _VOCAB_BPE_SHA256:
        raise DataError(f"{str(VOCAB_BPE)!r} is not GPT-2's vocabulary (its SHA-256 is {digest}): {remedy}")
    _version, *lines = content.decode().splitlines()
    return [tuple(line.split(" ")) for line in lines]


def load_vocabulary() -> dict[str, int]:
    """Return {token: id} in the order of ids; `json.dumps` of it is encoder.json, byte for byte."""
    tokens = [*_BYTE_OF, *map("".join, load_merges()), EOT_TEXT]
    return {token: number for number, token in enumerate(tokens)}


@cache
def load_tiktoken() -> "tiktoken.Encoding":
    """Build tiktoken's encoding "gpt2", equal to tiktoken.get_encoding("gpt2").

    Its `encode_ordinary` treats `<|endoftext|>` in a text as plain characters. For documents, use
    `Tokenizer.encode_document`.
    """
    import tiktoken

    vocabulary = load_vocabulary()
    del vocabulary[EOT_TEXT]
    ranks = {bytes(_BYTE_OF[character] for character in token): rank for token, rank in vocabulary.items()}
    return tiktoken.Encoding(
        "gpt2",
        pat_str=_SPLIT_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={EOT_TEXT: EOT},
        explicit_n_vocab=VOCAB_SIZE,
    )


@cache
def _load_gigatoken() -> Callable[[str], np.ndarray]:
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


def pieces(text: str) -> Iterator[tuple[int, int]]:
    """Split a long text, to save memory, into (begin, end) pieces whose tokens together are the tokens of the text."""
    begin = 0
    while len(text) - begin > _PIECE_CHARACTERS and (cut := _PIECE_END.search(text, begin + _PIECE_CHARACTERS)):
        yield begin, cut.end()
        begin = cut.end()
    yield begin, len(text)


def main() -> int:
    """Run `python -m data.tokenizer train`, see data/train_tokenizer.py, and return its exit code."""
    from data import train_tokenizer  # which imports this module

    return train_tokenizer.main()


if __name__ == "__main__":
    sys.exit(main())
