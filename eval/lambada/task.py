"""LAMBADA as lm-evaluation-harness scores it: task lambada_openai, version 1."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.items import DataInfo, check_fields, check_text, first_items, sha256_of, task_records
from eval.scoring import Tokenizer
from eval.task import BaseTask, Item, ItemResult, ItemScores, encode_together, perplexity, proportion

HUB_ID = "EleutherAI/lambada_openai"
FIELDS = ("context", "continuation")


@dataclass(frozen=True, kw_only=True)
class Task(BaseTask):
    """The passage up to its last space is the context. A space and the last word, encoded with it, are scored."""

    version = 1
    metrics = {  # noqa: RUF012 (a constant)
        "acc": "last words that greedy decoding gives (lm-evaluation-harness, lambada_openai)",
        "perplexity": "of a last word (lm-evaluation-harness, lambada_openai; the GPT-2 paper's is another protocol)",
    }
    full_size = 5_153

    def read(self, tokenizer: Tokenizer, max_length: int | None) -> tuple[list[Item], DataInfo]:
        """Read the passages. See BaseTask.

        `data` is "hub" (EleutherAI/lambada_openai), or a file of JSON lines with the fields context and continuation,
        or with the full passage as text.
        """
        records, name = task_records(self.name, self.data, HUB_ID, "test", ["default"])
        passages, count = first_items([_split_passage(record, where) for record, where in records], self.limit)
        requests = encode_together(tokenizer, [(context, [f" {word}"]) for context, word in passages])
        items = [Item([request], {"word": word}) for request, (_, word) in zip(requests, passages, strict=True)]
        return items, DataInfo(description=f"{name}, {count}", sha256=sha256_of(passages))

    def process_item(self, item: Item, scores: ItemScores) -> ItemResult:
        """Return the word, its log-likelihood (nats), its number of tokens, and whether they are all greedy."""
        [[score]] = scores
        return {
            "word": item.reference["word"],
            "log_likelihood": score.log_likelihood,
            "num_tokens": score.num_tokens,
            "is_greedy": score.is_greedy,
        }

    def compute_metrics(self, item_results: Sequence[ItemResult]) -> dict[str, float]:
        """Return acc (fraction of greedy words), perplexity (exp of minus the mean log-likelihood per word), and n.

        As in lm-evaluation-harness (tasks/lambada, version 1), but perplexity_stderr, which is a bootstrap's there, is
        the perplexity times the standard error of the mean log-likelihood (the delta method); nan for one passage.
        """
        values = np.array([result["log_likelihood"] for result in item_results], dtype=np.float64)
        n = len(values)
        ppl = perplexity(-values.mean())
        ppl_stderr = ppl * float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
        acc = proportion([result["is_greedy"] for result in item_results])
        return acc | {"perplexity": ppl, "perplexity_stderr": ppl_stderr, "n": n}


def _split_passage(record: Any, where: str) -> tuple[str, str]:
    """Return (the passage without its last word, the last word)."""
    if isinstance(record, dict) and "text" in record:
        check_text(record["text"], f"{where}: text")
        context, _, word = record["text"].rpartition(" ")
    else:
        check_fields(record, FIELDS, where)
        context, word = (record[name] for name in FIELDS)
    check_text(context, f"{where}: context")
    check_text(word, f"{where}: continuation")
    return context, word.lstrip(" ")
