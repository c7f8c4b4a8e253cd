"""CORE as nanochat scores it: few-shot prompts, accuracy above chance, the mean over the tasks."""

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from eval import EvalError
from eval.core.bundle import BUNDLE, CHOICES, COMPLETION, CORE, SCHEMA, CoreTask, read_bundle
from eval.items import DataInfo, sha256_of
from eval.scoring import Request, Tokenizer
from eval.task import BaseTask, Item, ItemResult, ItemScores, encode, proportion

_KINDS = {COMPLETION: "greedy completions", CHOICES: "choices", SCHEMA: "contexts of a continuation"}
_ITEMS_PER_ENCODING = 256


@dataclass(frozen=True, kw_only=True)
class Task(BaseTask):
    """CORE: each prompt starts with the tokenizer's beginning-of-text token and as many examples as the task has shots.

    The answer is the choice with the highest log-likelihood per token; a completion is correct if greedy decoding gives
    exactly its tokens. `limit` applies to each of the tasks. If a task is missing or limited, there is no "core" but
    "partial".
    """

    version = 1
    metrics = {  # noqa: RUF012 (a constant)
        "core": "mean over the 22 tasks of (accuracy - chance) / (1 - chance) (DCLM; nanochat's core_metric)",
        "partial": "the same mean over the tasks and items that are there; not comparable with core",
        **{task.name: f"accuracy, {task.shots} shots, chance {task.chance:g}, {_KINDS[task.kind]}" for task in CORE},
    }
    chance = 0.0
    full_size = sum(task.size for task in CORE)

    def read(self, tokenizer: Tokenizer, max_length: int | None) -> tuple[list[Item], DataInfo]:
        """Read the items of the tasks that are there. See BaseTask and `read_bundle`."""
        if self.data == "hub":
            raise EvalError(f"core needs its data: --data core=FOLDER_OR_ZIP; the bundle is {BUNDLE}")
        if tokenizer.bos_token_id is None:
            raise EvalError("core: the tokenizer has no token that begins texts, and each prompt starts with it")
        items: list[Item] = []
        names, hashes = [], []
        for task, records in read_bundle(self.data):
            indices = range(len(records))[: self.limit]
            items += make_items(task, records, indices, tokenizer, max_length)
            names.append(task.name)
            hashes.append(sha256_of([records[index] for index in indices]))
        limit = "" if self.limit is None else f", the first {self.limit:,} items of each"
        missing = [task.name for task in CORE if task.name not in names]
        without = f", without {', '.join(missing)}" if missing else ""
        description = f"{self.data}: {len(names)} of CORE's 22 tasks{limit}{without}"
        return items, DataInfo(description=description, sha256=sha256_of(hashes))

    def process_item(self, item: Item, scores: ItemScores) -> ItemResult:
        """Return the task, whether the answer is correct, and the mean log-likelihood per token of each choice."""
        flat = [score for request_scores in scores for score in request_scores]
        lengths = item.reference["num_scored"]
        means = [float(s.log_likelihoods[-n:].mean(dtype=np.float64)) for s, n in zip(flat, lengths, strict=True)]
        gold = item.reference["gold"]
        is_correct = flat[0].is_greedy if gold is None else int(np.argmax(means)) == gold
        return {
            "task": item.reference["task"],
            "is_correct": is_correct,
            "mean_log_likelihoods": means,
            "tokens_truncated": item.reference["num_cropped"],
        }

    def compute_metrics(self, item_results: Sequence[ItemResult]) -> dict[str, float]:
        """Return each task's accuracy with its standard error sqrt(p (1 - p) / (n - 1)), core with its own, and n.

        core is called partial if a task is missing or limited.
        """
        correct: dict[str, list[bool]] = defaultdict(list)
        for result in item_results:
            correct[result["task"]].append(result["is_correct"])
        metrics: dict[str, float] = {}
        centered, variance = [], 0.0
        for task in CORE:
            if task.name in correct:
                metrics |= proportion(correct[task.name], task.name)
                centered.append((metrics[task.name] - task.chance) / (1 - task.chance))
                variance += (metrics[f"{task.name}_stderr"] / (1 - task.chance)) ** 2
        name = "core" if len(centered) == len(CORE) and self.limit is None else "partial"
        mean, error = sum(centered) / len(centered), math.sqrt(variance) / len(centered)
        return metrics | {name: mean, f"{name}_stderr": error, "n": len(item_results)}


def make_items(
    task: CoreTask, records: list[dict[str, Any]], indices: Sequence[int], tokenizer: Tokenizer, max_length: int | None
) -> list[Item]:
    """Return the items of these indices of one of the tasks, ready to be scored.

    Args:
        records: all items of the task, from `read_bundle`; the examples come from them.
    """
    items = []
    for first in range(0, len(indices), _ITEMS_PER_ENCODING):
        some = indices[first : first + _ITEMS_PER_ENCODING]
        prompts = [_prompts(task, records, index) for index in some]
        tokens = iter(encode(tokenizer, [text for texts in prompts for text in texts]))
        for index, texts in zip(some, prompts, strict=True):
            ids = [[tokenizer.bos_token_id, *next(tokens)] for _ in texts]
            items.append(_make_item(task, records[index], ids, max_length, where=f"{task.name}, item {index}"))
    return items


def _prompts(task: CoreTask, records: list[dict[str, Any]], index: int) -> list[str]:
    """Return an item's prompts, one per choice; for a completion, the prompt without it and with it."""
    others = [i for i in range(len(records)) if i != index]
    shots = [records[i] for i in random.Random(1234 + index).sample(others, task.shots)]
    examples = "".join(f"{_answered(task, shot, shot.get('gold', 0))}\n\n" for shot in shots)
    item = records[index]
    if task.kind == COMPLETION:
        full = examples + _answered(task, item, 0)
        # White space at the end would be part of the completion's first token.
        return [full.removesuffix(item["continuation"]).strip(), full]
    choices = item["choices" if task.kind == CHOICES else "context_options"]
    return [examples + _answered(task, item, choice) for choice in range(len(choices))]


def _answered(task: CoreTask, item: dict[str, Any], choice: int) -> str:
    """Return an item's question with one of its answers; a completion has only one."""
    if task.kind == CHOICES:
        question, answer = item["query"], item["choices"][choice]
    elif task.kind == SCHEMA:
        question, answer = item["context_options"][choice], item["continuation"]
    else:
        question, answer = item["context"].strip(), item["continuation"]
    return f"{question}{task.delimiter}{answer}"


def _make_item(
    task: CoreTask, record: dict[str, Any], prompts: list[list[int]], max_length: int | None, where: str
) -> Item:
    """Return an item whose prompts have these token ids.

    Prompts longer than `max_length` lose their beginning, each for itself, so that their last token still fits, though
    it is never an input (nanochat's convention; lm-eval keeps one token more). Prompts whose context is the same after
    that share it.
    """
    if task.kind == COMPLETION:
        without, full = prompts
        prompts, start, gold = [full], len(without), None
        if full[:start] != without:
            raise EvalError(f"{where}: the tokens of the context are not the first ones of context and completion")
        num_scored = [len(full) - start]
    elif task.kind == CHOICES:
        start, gold = _common_length(prompts), record["gold"]
        num_scored = [len(tokens) - start for tokens in prompts]
    else:
        same_end, gold = _common_length([tokens[::-1] for tokens in prompts]), record["gold"]
        num_scored = [same_end] * len(prompts)
        start = min(_common_length(prompts), min(map(len, prompts)) - same_end)
    if min(num_scored) < 1 or start < 1:
        raise EvalError(f"{where}: an answer is empty, or two have the same tokens")
    kept = [tokens if max_length is None else tokens[-max_length:] for tokens in prompts]
    num_cropped = [len(tokens) - len(rest) for tokens, rest in zip(prompts, kept, strict=True)]
    split = [
        (rest[: max(1, start - n)], np.array(rest[max(1, start - n) :]))
        for rest, n in zip(kept, num_cropped, strict=True)
    ]
    requests = [
        Request(np.array(context), [continuation for _, continuation in group])
        for context, group in groupby(split, key=lambda pair: pair[0])
    ]
    reference = {"task": task.name, "gold": gold, "num_scored": num_scored, "num_cropped": max(num_cropped)}
    return Item(requests, reference)


def _common_length(sequences: Sequence[Sequence[int]]) -> int:
    """Return the number of tokens that all sequences begin with."""
    positions = enumerate(zip(*sequences, strict=False))
    return next((i for i, tokens in positions if len(set(tokens)) > 1), min(map(len, sequences)))
