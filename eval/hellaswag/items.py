"""HellaSwag's items: from the Hub, a file, or the sample in this folder."""

import re
from dataclasses import dataclass
from pathlib import Path

from eval import EvalError
from eval.items import (
    HubUnavailableError,
    Source,
    check_fields,
    check_text,
    file_records,
    first_items,
    hub_records,
    sha256_of,
    short,
)

HUB_ID = "Rowan/hellaswag"
SAMPLE = Path(__file__).parent / "sample.jsonl"
FIELDS = ("activity_label", "ctx_a", "ctx_b", "ctx", "endings", "label")
# What of a context each prompt is made of.
CONTEXT_FIELDS = {"lecture": ("ctx",), "lm_eval": ("activity_label", "ctx_a", "ctx_b")}


@dataclass(frozen=True)
class HellaSwagItem:
    """One context and its four endings, as they stand in the data; "" for what is not there and not needed."""

    activity_label: str
    ctx_a: str
    ctx_b: str
    """what the endings go on from in the middle of a sentence; may be empty"""
    ctx: str
    """ctx_a and ctx_b"""
    endings: tuple[str, str, str, str]
    label: int
    """the right ending, 0 to 3"""

    @property
    def lm_eval_query(self):
        """The context as lm-evaluation-harness writes it (tasks/hellaswag/utils.py, version 1)."""
        return lm_eval_text(f"{self.activity_label}: {self.ctx_a} {self.ctx_b.capitalize()}")

    @property
    def lm_eval_endings(self):
        return [lm_eval_text(ending) for ending in self.endings]


def lm_eval_text(text):
    """Without the tags of the half from WikiHow: lm-evaluation-harness, tasks/hellaswag/utils.py, `preprocess`."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def load_items(data="hub", limit=None, prompts=tuple(CONTEXT_FIELDS)):
    """
    Args:
        data: "hub": the validation split of Rowan/hellaswag, from the network or the local cache; where
            neither has it, the sample takes its place and the description says so. "sample": the 40 items of
            this project's own, for trying things out. Otherwise a .jsonl, .jsonl.gz or .jsonl.xz file with
            HellaSwag's fields in every line: endings, label, and those that the prompts are made of.
        limit: keep only the first so many items. All are checked regardless.
        prompts: those that will be made, names of CONTEXT_FIELDS.

    Returns:
        (list of HellaSwagItem, Source)

    Raises:
        EvalError: the file is missing or unreadable, or one of its lines is no item (the message names it);
            limit below 1.
    """
    context = {name for prompt in prompts for name in CONTEXT_FIELDS[prompt]}
    needed = [name for name in FIELDS if name in context or name in ("endings", "label")]
    is_sample = data == "sample"
    why = ""
    if data == "hub":
        try:
            records, name = hub_records(HUB_ID, "validation"), f"{HUB_ID} (validation)"
        except HubUnavailableError as error:
            is_sample = True
            why = f" ({HUB_ID} was not to be had: {error}; name a local copy of it to score that)"
    if is_sample:
        records = file_records(SAMPLE, fields=needed)
    elif data != "hub":
        records, name = file_records(data, fields=needed, others="'hub', 'sample', or "), str(data)

    items, count = first_items([_item(record, where, needed) for record, where in records], limit)
    if is_sample:
        description = (
            f"SAMPLE of {len(items)} items written for this project, NOT HellaSwag: not comparable with "
            f"published numbers{why}"
        )
    else:
        description = f"{name}, {count}"
    content = [[getattr(item, name) for name in FIELDS] for item in items]
    return items, Source(description=description, is_sample=is_sample, sha256=sha256_of(content))


def _item(record, where, needed):
    check_fields(record, needed, where)
    *context, endings, label = (record.get(name, "") for name in FIELDS)
    for name, text in zip(FIELDS, context, strict=False):
        if name in needed:
            check_text(text, f"{where}: {name}", may_be_empty=name == "ctx_b")
    if not isinstance(endings, list) or len(endings) != 4:
        got = f"{len(endings)} of them" if isinstance(endings, list) else short(endings)
        raise EvalError(f"{where}: endings must be a list of exactly 4 texts, got {got}")
    for index, ending in enumerate(endings):
        check_text(ending, f"{where}: ending {index}")
        check_text(lm_eval_text(ending), f"{where}: ending {index} without its [tags]")
    # The Hub's copy has the label as text, and an empty one in the test split.
    if isinstance(label, bool) or label not in (0, 1, 2, 3, "0", "1", "2", "3") or isinstance(label, float):
        raise EvalError(f"{where}: label must be 0, 1, 2 or 3 (the right ending), got {short(label)}")
    return HellaSwagItem(*context, tuple(endings), int(label))
