"""Where a task's items come from: the Hub, or a file of JSON lines."""

import gzip
import hashlib
import json
import lzma
import zlib
from dataclasses import dataclass
from pathlib import Path

from eval import EvalError
from eval.hub import why_unreachable

_OPENERS = {".jsonl": open, ".gz": gzip.open, ".xz": lzma.open}


@dataclass(frozen=True, kw_only=True)
class Source:
    """What was loaded, to be shown beside every number that comes of it."""

    description: str
    sha256: str
    """of the items themselves, wherever they came from"""
    is_sample: bool = False
    """the items are this project's own, not the task's"""


class HubUnavailableError(Exception):
    """The message is the reason."""


def hub_records(dataset, split, name=None):
    """
    A split of a data set on the Hub, from the network or the local cache.

    Returns:
        list of (dict, where it stands)

    Raises:
        HubUnavailableError: neither has it.
    """
    why = why_unreachable()

    import datasets
    from datasets.exceptions import DatasetsError

    was_offline = datasets.config.HF_HUB_OFFLINE
    if why is not None:
        datasets.config.HF_HUB_OFFLINE = True  # straight to the cache, see why_unreachable
    try:
        records = datasets.load_dataset(dataset, name, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise HubUnavailableError(why or " ".join(str(error).split())) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
    return [(record, f"{dataset}, item {index}") for index, record in enumerate(records)]


def file_records(path, *, fields, or_field=None, others=""):
    """
    The objects of a .jsonl, .jsonl.gz or .jsonl.xz file.

    Args:
        fields: names that each object must have.
        or_field: one that will do in their place.
        others: what else may be given in a file's place, for the error message.

    Returns:
        list of (dict, where it stands), one or more.

    Raises:
        EvalError: the file is missing, unreadable or empty, or one of its lines is no such object.
    """
    path = Path(path)
    opener = _OPENERS.get(path.suffix)
    if opener is None or not path.is_file():
        problem = "no such file" if not path.is_file() else f"files ending in {path.suffix!r} are not read"
        raise EvalError(f"items {str(path)!r}: {problem}; give {others}a .jsonl, .jsonl.gz or .jsonl.xz file")
    records = []
    number = 0
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    records.append((_parsed(line, f"{path}:{number}"), f"{path}:{number}"))
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise EvalError(
            f"{path}: cannot be read past line {number} ({error}); the file is damaged or not yours to read"
        ) from error
    if not records:
        raise EvalError(f"{path}: no items in it; each line is one, with the fields {_listed(fields)}")
    for record, where in records:
        if not (isinstance(record, dict) and or_field in record):
            check_fields(record, fields, where)
    return records


def _parsed(line, where):
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise EvalError(f"{where}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise EvalError(f"{where}: not JSON ({error}); each line must be one JSON object") from error


def check_fields(record, fields, where):
    """Raises EvalError for what is no object with these fields."""
    if not isinstance(record, dict):
        raise EvalError(f"{where}: {short(record)} is no JSON object with the fields {_listed(fields)}")
    for name in fields:
        if name not in record:
            raise EvalError(f"{where}: the field {name!r} is missing; an item has {_listed(fields)}")


def check_text(text, what, *, may_be_empty=False):
    """Raises EvalError for what is no text, or none that can be encoded."""
    if not isinstance(text, str):
        raise EvalError(f"{what} must be text, got {short(text)}")
    if not text.strip() and not may_be_empty:
        raise EvalError(f"{what} is empty; write the text or remove the item")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise EvalError(f"{what} is no valid Unicode (half of a surrogate pair at {error.start})") from error


def check_limit(limit):
    """Raises EvalError for one below 1."""
    if limit is not None and limit < 1:
        raise EvalError(f"the limit on items must be at least 1, got {limit}")


def first_items(items, limit):
    """
    Returns:
        (the first so many items, all if limit is None; "all 40 items" or "the first 5 of 40 items")

    Raises:
        EvalError: limit below 1.
    """
    check_limit(limit)
    kept = items[:limit]
    count = f"all {len(items):,}" if len(kept) == len(items) else f"the first {len(kept):,} of {len(items):,}"
    return kept, f"{count} items"


def sha256_of(content):
    """Of anything JSON-able."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def short(value):
    """A value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _listed(fields):
    return f"{', '.join(fields[:-1])} and {fields[-1]}" if len(fields) > 1 else fields[0]
