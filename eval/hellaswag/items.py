"""Where HellaSwag's items come from: the Hub, a file, or the sample in this folder."""

import gzip
import hashlib
import json
import lzma
import zlib
from dataclasses import dataclass
from pathlib import Path

from eval import EvalError
from eval.hub import why_unreachable

HUB_ID = "Rowan/hellaswag"
NUM_VALIDATION_ITEMS = 10_042
SAMPLE = Path(__file__).parent / "sample.jsonl"

_OPENERS = {".jsonl": open, ".gz": gzip.open, ".xz": lzma.open}


@dataclass(frozen=True)
class HellaSwagItem:
    """One context and its four endings."""

    context: str
    endings: tuple[str, str, str, str]
    label: int
    """the right ending, 0 to 3"""


@dataclass(frozen=True, kw_only=True)
class ItemSource:
    """What was loaded, to be shown beside every number that comes of it."""

    description: str
    is_sample: bool
    """the items are this project's own, not HellaSwag"""
    sha256: str
    """of the items themselves, wherever they came from: of their JSON, in order"""


def load_items(data="hub", limit=None):
    """
    Args:
        data: "hub": the validation split of Rowan/hellaswag, from the network or the local cache; where
            neither has it, the sample takes its place and the description says so. "sample": the 40 items of
            this project's own, for trying things out. Otherwise a .jsonl, .jsonl.gz or .jsonl.xz file with
            HellaSwag's fields `ctx`, `endings` and `label` in every line.
        limit: keep only the first so many items. All are checked regardless.

    Returns:
        (list of HellaSwagItem, ItemSource)

    Raises:
        EvalError: the file is missing or unreadable, or one of its lines is no item (the message names it);
            limit below 1.
    """
    if limit is not None and limit < 1:
        raise EvalError(f"the limit on items must be at least 1, got {limit}")
    is_sample = data == "sample"
    why = ""
    if data == "hub":
        try:
            items, name = _from_hub(), f"{HUB_ID} (validation)"
        except _HubUnavailableError as error:
            is_sample = True
            why = f" ({HUB_ID} was not to be had: {error}; name a local copy of it to score that)"
    if is_sample:
        items = _from_file(SAMPLE)
    elif data != "hub":
        items, name = _from_file(Path(data)), str(data)

    total = len(items)
    items = items[:limit]
    if is_sample:
        description = (
            f"SAMPLE of {len(items)} items written for this project, NOT HellaSwag: not comparable with "
            f"published numbers{why}"
        )
    else:
        count = f"all {total:,}" if len(items) == total else f"the first {len(items):,} of {total:,}"
        description = f"{name}, {count} items"
    content = json.dumps([[item.context, item.endings, item.label] for item in items])
    return items, ItemSource(
        description=description, is_sample=is_sample, sha256=hashlib.sha256(content.encode()).hexdigest()
    )


class _HubUnavailableError(Exception):
    """The message is the reason."""


def _from_hub():
    why = why_unreachable()

    import datasets
    from datasets.exceptions import DatasetsError

    was_offline = datasets.config.HF_HUB_OFFLINE
    if why is not None:
        datasets.config.HF_HUB_OFFLINE = True  # straight to the cache, see why_unreachable
    try:
        records = datasets.load_dataset(HUB_ID, split="validation")
    except (OSError, ValueError, DatasetsError) as error:
        raise _HubUnavailableError(why or " ".join(str(error).split())) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
    return [_item(record, f"{HUB_ID}, item {index}") for index, record in enumerate(records)]


def _from_file(path):
    opener = _OPENERS.get(path.suffix)
    if opener is None or not path.is_file():
        problem = "no such file" if not path.is_file() else f"files ending in {path.suffix!r} are not read"
        raise EvalError(
            f"items {str(path)!r}: {problem}; give 'hub', 'sample', or a .jsonl, .jsonl.gz or .jsonl.xz file"
        )
    items = []
    number = 0
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    items.append(_item(_parsed(line, f"{path}:{number}"), f"{path}:{number}"))
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise EvalError(
            f"{path}: cannot be read past line {number} ({error}); the file is damaged or not yours to read"
        ) from error
    if not items:
        raise EvalError(f"{path}: no items in it; each line is one, with the fields ctx, endings and label")
    return items


def _parsed(line, where):
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise EvalError(f"{where}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise EvalError(f"{where}: not JSON ({error}); each line must be one JSON object") from error


def _item(record, where):
    if not isinstance(record, dict):
        raise EvalError(f"{where}: {_short(record)} is no JSON object with the fields ctx, endings and label")
    for name in ("ctx", "endings", "label"):
        if name not in record:
            raise EvalError(f"{where}: the field {name!r} is missing; an item has ctx, endings and label")
    endings, label = record["endings"], record["label"]
    _check_text(record["ctx"], f"{where}: ctx")
    if not isinstance(endings, list) or len(endings) != 4:
        got = f"{len(endings)} of them" if isinstance(endings, list) else _short(endings)
        raise EvalError(f"{where}: endings must be a list of exactly 4 texts, got {got}")
    for index, ending in enumerate(endings):
        _check_text(ending, f"{where}: ending {index}")
    # The Hub's copy has the label as text, and an empty one in the test split.
    if isinstance(label, bool) or label not in (0, 1, 2, 3, "0", "1", "2", "3") or isinstance(label, float):
        raise EvalError(f"{where}: label must be 0, 1, 2 or 3 (the right ending), got {_short(label)}")
    return HellaSwagItem(record["ctx"], tuple(endings), int(label))


def _check_text(text, what):
    if not isinstance(text, str):
        raise EvalError(f"{what} must be text, got {_short(text)}")
    if not text.strip():
        raise EvalError(f"{what} is empty; write the text or remove the item")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise EvalError(f"{what} is no valid Unicode (half of a surrogate pair at {error.start})") from error


def _short(value):
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
