"""Load HellaSwag's items from the Hub, a file, or the sample in this folder."""

import re
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from eval import EvalError
from eval.items import (
    DataInfo,
    HubUnavailableError,
    check_fields,
    check_text,
    file_records,
    first_items,
    hub_records,
    sha256_of,
)

HUB_ID = "Rowan/hellaswag"
SAMPLE = Path(__file__).parent / "sample.jsonl"
# The fields from which each prompt makes its context.
CONTEXT_FIELDS = {"lecture": ("ctx",), "lm_eval": ("activity_label", "ctx_a", "ctx_b")}


@dataclass(frozen=True)
class HellaSwagItem:
    """A context and its four endings, as in the data; "" for a field that is missing and not needed."""

    activity_label: str
    ctx_a: str
    ctx_b: str
    """the beginning of the sentence that the endings complete; may be empty"""
    ctx: str
    """ctx_a and ctx_b"""
    endings: tuple[str, ...]
    """four of them"""
    label: int
    """the index of the correct ending, 0 to 3"""

    @property
    def lm_eval_query(self) -> str:
        """The context in lm-evaluation-harness's format (tasks/hellaswag/utils.py, version 1)."""
        return lm_eval_text(f"{self.activity_label}: {self.ctx_a} {self.ctx_b.capitalize()}")

    @property
    def lm_eval_endings(self) -> list[str]:
        """The endings in lm-evaluation-harness's format."""
        return [lm_eval_text(ending) for ending in self.endings]


FIELDS = tuple(field.name for field in fields(HellaSwagItem))


def lm_eval_text(text: str) -> str:
    """Remove WikiHow's [tags] as lm-evaluation-harness does (tasks/hellaswag/utils.py, `preprocess`)."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def load_items(
    data: str | Path = "hub", limit: int | None = None, prompts: Collection[str] = tuple(CONTEXT_FIELDS)
) -> tuple[list[HellaSwagItem], DataInfo]:
    """Load HellaSwag's items.

    Args:
        data: "hub": the validation split of Rowan/hellaswag, from the network or the local cache; if neither has it,
            the sample is used instead and the description says so. "sample": 40 items written for this project.
            Otherwise a file of JSON lines with HellaSwag's fields: endings, label, and those that the prompts need.
        limit: return only the first `limit` items; all are checked.
        prompts: names of CONTEXT_FIELDS.

    Raises:
        UserError: the file is missing or unreadable, or the item that the message names is malformed.
    """
    required = {"endings", "label"}.union(*(CONTEXT_FIELDS[prompt] for prompt in prompts))
    is_sample, reason = data == "sample", ""
    if data == "hub":
        try:
            records, name = hub_records(HUB_ID, "validation")
        except HubUnavailableError as error:
            is_sample = True
            reason = f" ({HUB_ID} is not available: {error}; give a local copy of it to score that)"
    elif not is_sample:
        records, name = file_records(data, alternatives="'hub', 'sample', or "), str(data)
    if is_sample:
        records, name = file_records(SAMPLE), "sample"

    items, count = first_items([_make_item(record, where, required) for record, where in records], limit)
    description = f"{name}, {count}"
    if is_sample:
        description = (
            f"SAMPLE of {len(items)} items written for this project, NOT HellaSwag: not comparable with "
            f"published numbers{reason}"
        )
    content = [[getattr(item, name) for name in FIELDS] for item in items]
    return list(items), DataInfo(description=description, is_sample=is_sample, sha256=sha256_of(content))


def _make_item(record: Any, where: str, required: Collection[str]) -> HellaSwagItem:
    check_fields(record, [name for name in FIELDS if name in required], where)
    endings, label = record["endings"], record["label"]
    context = {name: record.get(name, "") for name in ("activity_label", "ctx_a", "ctx_b", "ctx")}
    for name, text in context.items():
        if name in required:
            check_text(text, f"{where}: {name}", may_be_empty=name == "ctx_b")
    if not isinstance(endings, list) or len(endings) != 4:
        got = f"{len(endings)} of them" if isinstance(endings, list) else f"{endings!r:.60}"
        raise EvalError(f"{where}: endings must be a list of exactly 4 texts, got {got}")
    for index, ending in enumerate(endings):
        check_text(ending, f"{where}: ending {index}")
        check_text(lm_eval_text(ending), f"{where}: ending {index} without its [tags]")
    # The Hub's copy has the label as text, and an empty one in the test split.
    if isinstance(label, bool) or label not in (0, 1, 2, 3, "0", "1", "2", "3") or isinstance(label, float):
        raise EvalError(f"{where}: label must be 0, 1, 2 or 3 (the correct ending), got {label!r:.60}")
    return HellaSwagItem(**context, endings=tuple(endings), label=int(label))
