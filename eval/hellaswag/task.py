"""HellaSwag as build-nanogpt and llm.c score it, and as lm-evaluation-harness does, in one pass over the items."""

from collections.abc import Sequence
from dataclasses import dataclass

from eval import EvalError
from eval.hellaswag.accuracy import accuracy
from eval.hellaswag.items import CONTEXT_FIELDS, HellaSwagItem, load_items
from eval.items import DataInfo
from eval.scoring import Request, Tokenizer
from eval.task import BaseTask, Item, ItemResult, ItemScores, encode, encode_together

LECTURE, LM_EVAL = CONTEXT_FIELDS


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
        if not self.prompts or not set(self.prompts) <= set(_REQUESTS):
            raise EvalError(f"hellaswag: prompts must be one or more of {', '.join(_REQUESTS)}, got {self.prompts}")
        examples, data = load_items(self.data, self.limit, self.prompts)
        requests = [_REQUESTS[prompt](tokenizer, examples) for prompt in self.prompts]
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


def _lecture_requests(tokenizer: Tokenizer, examples: list[HellaSwagItem]) -> list[Request]:
    texts = [text for e in examples for text in (e.ctx, *(f" {ending}" for ending in e.endings))]
    tokens = iter(encode(tokenizer, texts))
    return [Request(next(tokens), [next(tokens) for _ in e.endings]) for e in examples]


def _lm_eval_requests(tokenizer: Tokenizer, examples: list[HellaSwagItem]) -> list[Request]:
    pairs = [(e.lm_eval_query, [f" {ending}" for ending in e.lm_eval_endings]) for e in examples]
    return encode_together(tokenizer, pairs)


_REQUESTS = {LECTURE: _lecture_requests, LM_EVAL: _lm_eval_requests}
