"""Read nanoGPT's meta.pkl, which describes its character-level data sets, without unpickling it."""

import pickletools
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
        or not all(isinstance(key, str) and isinstance(number, int) for key, number in characters.items())
        or sorted(characters.values()) != list(range(len(characters)))
    ):
        raise DataError(f"{path}: no table of characters (stoi) in it; name the tokenizer with --tokenizer")
    if any(len(character) != 1 for character in characters):
        raise DataError(f"{path}: its tokens are not characters; name the tokenizer with --tokenizer")
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models

    fast = FastTokenizer(models.BPE(vocab=characters, merges=[]))
    fast.decoder = decoders.Fuse()
    fast.add_special_tokens([EOT_TEXT])
    return make_tokenizer("characters", fast.to_str())


def read_plain_pickle(path: Path) -> dict[Any, Any]:
    """Read a pickle of dicts, texts and integers by its opcodes; nothing in it is executed."""
    stack: list[Any] = []
    memo: list[Any] = []
    mark = object()
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("too large")
        argument: Any
        for opcode, argument, _ in pickletools.genops(path.read_bytes()):
            name = opcode.name
            if name in ("PROTO", "FRAME", "STOP"):
                continue
            if name == "EMPTY_DICT":
                stack.append({})
            elif name == "MARK":
                stack.append(mark)
            elif name in ("BININT", "BININT1", "BININT2", "SHORT_BINUNICODE", "BINUNICODE"):
                stack.append(argument)
            elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
                memo.append(stack[-1])
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name in ("SETITEM", "SETITEMS"):
                start = len(stack) - 2 if name == "SETITEM" else max(i for i, x in enumerate(stack) if x is mark)
                items = stack[start + (name == "SETITEMS") :]
                del stack[start:]
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            else:
                raise ValueError(f"opcode {name}")
        [content] = stack
        if not isinstance(content, dict):
            raise ValueError("not a dict")
    except (OSError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not a dict of texts and numbers ({error}); it is not unpickled, which could run any code. "
            "Name the tokenizer with --tokenizer"
        ) from error
    return content
