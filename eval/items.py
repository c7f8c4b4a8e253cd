"""Read a task's items from the Hub or from a file of JSON lines."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from common.errors import one_line
from common.hub import hub_error
from common.jsonl import COMPRESSIONS, json_lines
from eval import EvalError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """A description of the loaded items, to be shown next to every number computed from them."""

    description: str
    sha256: str
    """of the items themselves, wherever they came from"""
    is_sample: bool = False
    """True if the items are this project's own sample, not the task's"""


class HubUnavailableError(Exception):
    """A dataset is neither on a Hub that can be reached nor in the local cache. The message is the reason."""


def hub_records(dataset: str, split: str, name: str | None = None) -> tuple[Iterable[tuple[dict[str, Any], str]], str]:
    """Return a split of a dataset on the Hub, from the network or the local cache.

    Returns:
        pairs of a record and its location, and a description: "DATASET (SPLIT, revision SHA)"

    Raises:
        HubUnavailableError: neither has it.
    """
    unreachable = hub_error()

    import datasets

    was_offline = datasets.config.HF_HUB_OFFLINE
    if unreachable is not None:
        datasets.config.HF_HUB_OFFLINE = True  # read the cache at once, see hub_error
    try:
        records = datasets.load_dataset(dataset, name, split=split)
    except Exception as error:  # of the HTTP library, hf_xet, or a library that reads a format
        raise HubUnavailableError(unreachable or one_line(error, 1000)) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
    # The files' addresses on the Hub, hf://datasets/OWNER/NAME@SHA/PATH; a dataset that is not on the Hub has others.
    found = re.search(r"@([0-9a-f]{40})/", " ".join(records.info.download_checksums or {}))
    revision = f", revision {found[1]}" if found else ""
    pairs = ((record, f"{dataset}, item {index}") for index, record in enumerate(records))
    return pairs, f"{dataset} ({split}{revision})"


def file_records(path: str | Path, *, alternatives: str = "") -> list[tuple[Any, str]]:
    """Read a .jsonl file, plain or compressed (.gz, .xz, .zst).

    Args:
        path: the file; blank lines are skipped.
        alternatives: what the user may give instead of a file, for the error message.

    Returns:
        pairs of a line's JSON value and its location ("PATH:LINE"), at least one.

    Raises:
        UserError: the file is missing, unreadable or empty, or a line is not JSON.
    """
    path = Path(path)
    if not path.is_file() or path.suffix not in (".jsonl", *COMPRESSIONS):
        problem = f"cannot read files ending in {path.suffix!r}" if path.is_file() else "no such file"
        raise EvalError(f"items {str(path)!r}: {problem}; give {alternatives}a .jsonl file (also .gz, .xz, .zst)")
    records = [(value, where) for where, value in json_lines(path)]
    if not records:
        raise EvalError(f"{path}: the file has no items; write one JSON object per line")
    return records


def task_records(
    task: str, data: str, dataset: str, split: str, names: Sequence[str | None] = (None,)
) -> tuple[list[tuple[Any, str]], str]:
    """Return the records of a task and where they come from: with data "hub" a dataset's subsets, otherwise a file's.

    Raises:
        UserError: the dataset is not available, or the file is not a readable .jsonl file.
    """
    if data != "hub":
        return file_records(data, alternatives="'hub' or "), data
    try:
        subsets = [hub_records(dataset, split, name) for name in names]
        return [pair for pairs, _ in subsets for pair in pairs], subsets[0][1]
    except HubUnavailableError as error:
        raise EvalError(f"{dataset} is not available ({error}); give a local copy with --data {task}=FILE") from error


def check_fields(record: Any, fields: Sequence[str], where: str) -> None:
    """Raise EvalError if `record` is not a dict with these fields."""
    if not isinstance(record, dict):
        raise EvalError(f"{where}: {record!r:.60} is not a JSON object with the fields {', '.join(fields)}")
    for name in fields:
        if name not in record:
            raise EvalError(f"{where}: the field {name!r} is missing; an item has the fields {', '.join(fields)}")


def check_text(text: Any, what: str, *, may_be_empty: bool = False) -> None:
    """Raise EvalError if `text` is not a string, is blank, or cannot be encoded as UTF-8."""
    if not isinstance(text, str):
        raise EvalError(f"{what} must be text, got {text!r:.60}")
    if not text.strip() and not may_be_empty:
        raise EvalError(f"{what} is empty; write the text or remove the item")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise EvalError(
            f"{what} is not valid Unicode (half of a surrogate pair at {error.start}); remove that character"
        ) from error


def first_items(items: Sequence[T], limit: int | None) -> tuple[Sequence[T], str]:
    """Return the first `limit` items (all if None) and a description like "the first 5 of 40 items"."""
    kept = items[:limit]
    count = f"all {len(items):,}" if len(kept) == len(items) else f"the first {len(kept):,} of {len(items):,}"
    return kept, f"{count} items"


def sha256_of(content: Any) -> str:
    """Return the SHA-256 of a JSON-serializable value."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
