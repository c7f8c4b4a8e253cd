"""HellaSwag as build-nanogpt and llm.c score it, and as lm-evaluation-harness does, in one pass over the items."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from eval import EvalError
from eval.hellaswag.accuracy import accuracy
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
from eval.scoring import Request, Tokenizer
from eval.task import BaseTask, Item, ItemResult, ItemScores, encode, encode_together

HUB_ID = "Rowan/hellaswag"
SAMPLE = Path(__file__).parent / "sample.jsonl"
LECTURE, LM_EVAL = "lecture", "lm_eval"
# The fields from which each prompt makes its context.
CONTEXT_FIELDS = {LECTURE: ("ctx",), LM_EVAL: ("activity_label", "ctx_a", "ctx_b")}


class HellaSwagItem(NamedTuple):
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


@dataclass(frozen=True, kw_only=True)
class Task(BaseTask):
    """HellaSwag with two prompts, each with two ways to choose an ending.

    lecture    the context as in the data; a space and the ending, encoded separately
               (build-nanogpt hellaswag.py, llm.c dev/data/hellaswag.py)
    lm_eval    "activity_label: ctx_a Ctx_b", tags in brackets removed; context and ending encoded together
               (lm-evaluation-harness, tasks/hellaswag version 1)
    """

    prompts: tuple[str, ...] = (LECTURE, LM_EVAL)
    """which of the two to score; each costs the same"""

    version = 2  # version 1 had only the lecture's prompt
    metrics = {  # noqa: RUF012 (a constant)
        "acc": "the most probable ending (build-nanogpt's and llm.c's acc)",
        "acc_norm": "the most probable per token (build-nanogpt's and llm.c's acc_norm)",
        "lm_eval_acc": "the most probable ending (lm-evaluation-harness's acc and prompt)",
        "lm_eval_acc_norm": "the most probable per character (lm-evaluation-harness's acc_norm and prompt)",
    }
    main_metric = "acc_norm"
    chance = 0.25
    full_size = 10_042

    def read(self, tokenizer: Tokenizer, max_length: int | None) -> tuple[list[Item], DataInfo]:
        """Read the items with `load_items`, which lists the values of `data`. See BaseTask."""
        if not self.prompts or not set(self.prompts) <= set(CONTEXT_FIELDS):
            names = ", ".join(CONTEXT_FIELDS)
            raise EvalError(f"hellaswag: prompts must be one or more of {names}, got {self.prompts}")
        examples, data = load_items(self.data, self.limit, self.prompts)
        requests = [_requests(prompt, tokenizer, examples) for prompt in self.prompts]
        items = []
        for example, *item_requests in zip(examples, *requests, strict=True):
            num_characters = [len(ending) for ending in example.lm_eval_endings]
            items.append(Item(item_requests, {"label": example.label, "num_characters": num_characters}))
        return items, data

    def process_item(self, item: Item, scores: ItemScores) -> ItemResult:
        """Return the label, and for each prompt the log-likelihoods (nats) and lengths of all four endings."""
        result: ItemResult = {"label": item.reference["label"]}
        for prompt, ending_scores in zip(self.prompts, scores, strict=True):
            result[f"{prompt}_log_likelihoods"] = [score.log_likelihood for score in ending_scores]
            result[f"{prompt}_num_tokens"] = [score.num_tokens for score in ending_scores]
        if LM_EVAL in self.prompts:
            result["lm_eval_num_characters"] = item.reference["num_characters"]
        return result

    def compute_metrics(self, item_results: Sequence[ItemResult]) -> dict[str, float]:
        """Return acc, acc_norm, lm_eval_acc, lm_eval_acc_norm, their standard errors, and n."""
        labels = [result["label"] for result in item_results]
        metrics: dict[str, float] = {}
        for prompt, prefix, length in ((LECTURE, "", "num_tokens"), (LM_EVAL, "lm_eval_", "num_characters")):
            if prompt in self.prompts:
                predictions = [
                    {"log_likelihoods": r[f"{prompt}_log_likelihoods"], "lengths": r[f"{prompt}_{length}"]}
                    for r in item_results
                ]
                metrics |= {f"{prefix}{name}": x for name, x in accuracy(predictions, labels).items() if name != "n"}
        return metrics | {"n": len(labels)}


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

    required = {"endings", "label"}.union(*(CONTEXT_FIELDS[prompt] for prompt in prompts))
    items, count = first_items([_make_item(record, where, required) for record, where in records], limit)
    description = f"{name}, {count}"
    if is_sample:
        description = (
            f"SAMPLE of {len(items)} items written for this project, NOT HellaSwag: not comparable with "
            f"published numbers{reason}"
        )
    return list(items), DataInfo(description=description, is_sample=is_sample, sha256=sha256_of(items))


def _make_item(record: Any, where: str, required: Collection[str]) -> HellaSwagItem:
    check_fields(record, [name for name in HellaSwagItem._fields if name in required], where)
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
    if str(label) not in ("0", "1", "2", "3"):  # text on the Hub, and empty in its test split
        raise EvalError(f"{where}: label must be 0, 1, 2 or 3 (the correct ending), got {label!r:.60}")
    return HellaSwagItem(**context, endings=tuple(endings), label=int(label))


def lm_eval_text(text: str) -> str:
    """Remove WikiHow's [tags] as lm-evaluation-harness does (tasks/hellaswag/utils.py, `preprocess`)."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _requests(prompt: str, tokenizer: Tokenizer, items: list[HellaSwagItem]) -> list[Request]:
    if prompt == LM_EVAL:
        pairs = [(item.lm_eval_query, [f" {ending}" for ending in item.lm_eval_endings]) for item in items]
        return encode_together(tokenizer, pairs)
    texts = [text for item in items for text in (item.ctx, *(f" {ending}" for ending in item.endings))]
    tokens = iter(encode(tokenizer, texts))
    return [Request(next(tokens), [next(tokens) for _ in item.endings]) for item in items]
