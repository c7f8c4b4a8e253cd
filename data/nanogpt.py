"""Read nanoGPT's meta.pkl, which describes its character-level data sets, without running code from it."""

import pickle
from pathlib import Path
from typing import Any

from data import DataError
from data.manifest import NANOGPT_META
from data.tokenizer import EOT_TEXT, Tokenizer, make_tokenizer

_MAX_BYTES = 10_000_000


def nanogpt_tokenizer(folder: str | Path) -> Tokenizer | None:
    """Return the tokenizer of a character-level data set of nanoGPT; None for a folder without a meta.pkl.

    nanoGPT has no eos token, so one is added after its characters. Raises DataError for anything but characters.
    """
    path = Path(folder) / NANOGPT_META
    if not path.is_file():
        return None
    meta = read_plain_pickle(path)
    characters = meta.get("stoi")
    if (
        not isinstance(characters, dict)
        or not all(isinstance(key, str) and len(key) == 1 for key in characters)
        or not all(isinstance(number, int) for number in characters.values())
        or sorted(characters.values()) != list(range(len(characters)))
    ):
        raise DataError(f"{path}: no table of characters (stoi) in it; name the tokenizer with --tokenizer")
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models

    fast = FastTokenizer(models.BPE(vocab=characters, merges=[]))
    fast.decoder = decoders.Fuse()
    fast.add_special_tokens([EOT_TEXT])
    return make_tokenizer("characters", fast.to_str())


class _PlainUnpickler(pickle.Unpickler):
    """Reads texts, numbers and containers of them: classes and functions, which could run code, are not found."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"it refers to {module}.{name}")


def read_plain_pickle(path: Path) -> dict[Any, Any]:
    """Read a pickle of dicts, texts and numbers; nothing in it is executed."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("too large")
        with path.open("rb") as file:
            content = _PlainUnpickler(file).load()
        if not isinstance(content, dict):
            raise ValueError("not a dict")
    except Exception as error:  # a damaged pickle raises errors of many classes
        raise DataError(
            f"{path}: not a dict of texts and numbers ({error}); what could run code is not unpickled. Name the "
            "tokenizer with --tokenizer"
        ) from error
    return content
