"""The base class of tasks, and scoring a task's items.

Each task is a folder of eval/ with a `task.py` in it, whose class `Task` derives from `BaseTask`.
`python -m eval --tasks NAME` and `eval.evaluate` find it there. CONTRIBUTING.md has an example.
"""

import difflib
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeAlias, TypeVar

from eval import EvalError
from eval.items import DataInfo
from eval.scoring import ContinuationScore, Model, Request, Tokenizer, loglikelihoods

ItemScores: TypeAlias = list[list[ContinuationScore]]
"""for each request of an item, the score of each continuation"""
ItemResult: TypeAlias = dict[str, Any]
"""JSON-serializable: what the metrics are computed from, and what `--per_item` writes"""
T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """One question."""

    requests: list[Request]
    """what the model scores"""
    reference: dict[str, Any]
    """what the metrics need besides the scores: the correct choice, lengths, ..."""


class LoadedTask(NamedTuple):
    """A task with its items."""

    task: "BaseTask"
    items: list[Item]
    data: DataInfo

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name


@dataclass(frozen=True, kw_only=True)
class BaseTask:
    """An evaluation task. Its dataclass fields are its settings."""

    data: str = "hub"
    """where the items come from: "hub", or a file or folder that the task can read"""
    limit: int | None = None
    """score only the first `limit` items"""

    version: ClassVar[int]
    """increased by every change that changes the metrics"""
    metrics: ClassVar[dict[str, str]]
    """a description of each metric: what it is, and whose convention"""
    main_metric: ClassVar[str | None] = None
    """the metric that training shows; None: the first of `metrics` that the results have"""
    chance: ClassVar[float | None] = None
    """the main metric's expected value for guesses"""
    full_size: ClassVar[int | None] = None
    """number of items that published results are computed over"""

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.limit is not None and self.limit < 1:
            raise EvalError(f"{self.name}: limit must be at least 1, got {self.limit}")

    @property
    def name(self) -> str:
        """The name of the task's folder."""
        return type(self).__module__.split(".")[-2]

    def load(self, tokenizer: Tokenizer, max_length: int | None = None) -> LoadedTask:
        """Load the items, and check that they fit a context of `max_length` tokens (None: any).

        Raises:
            UserError: the items are missing, or the item that the message names is malformed or does not fit.
        """
        items, data = self.read(tokenizer, max_length)
        for index, item in enumerate(items):
            longest = max(len(tokens) for request in item.requests for tokens in request.continuations)
            if max_length is not None and longest > max_length:
                raise EvalError(
                    f"item {index} (counted from 0) has {longest} tokens to score, and the model's context is "
                    f"{max_length}: use other items, or a model with a longer context"
                )
        return LoadedTask(self, items, data)

    def read(self, tokenizer: Tokenizer, max_length: int | None) -> tuple[list[Item], DataInfo]:
        """Read the items; `load` then checks that they fit the context. Each task implements this."""
        raise NotImplementedError

    def process_item(self, item: Item, scores: ItemScores) -> ItemResult:
        """Return an item's result."""
        raise NotImplementedError

    def compute_metrics(self, item_results: Sequence[ItemResult]) -> dict[str, float]:
        """Return the metrics over one or more item results, their standard errors as NAME_stderr, and n."""
        raise NotImplementedError

    def aggregate(self, item_results: Sequence[ItemResult]) -> dict[str, float]:
        """Return the task's metrics, and as "num_truncated" the number of items longer than the model's context."""
        num_truncated = sum(result["tokens_truncated"] > 0 for result in item_results)
        return self.compute_metrics(item_results) | {"num_truncated": num_truncated}


def score_items(
    task: BaseTask,
    model: Model,
    items: Sequence[Item],
    *,
    tokens_per_batch: int | None = None,
    on_batch: Callable[[int], object] | None = None,
) -> list[ItemResult]:
    """Return each item's result, with "tokens_truncated" added: the number of tokens that did not fit the context.

    A task that cuts its items itself returns its own number.

    For tokens_per_batch, on_batch and errors see `loglikelihoods`.
    """
    requests = [request for item in items for request in item.requests]
    scores = iter(loglikelihoods(model, requests, tokens_per_batch=tokens_per_batch, on_batch=on_batch))
    results = []
    for item in items:
        item_scores = [next(scores) for _ in item.requests]
        tokens_truncated = max(score.num_truncated for request_scores in item_scores for score in request_scores)
        results.append({"tokens_truncated": tokens_truncated} | task.process_item(item, item_scores))
    return results


def proportion(correct: Sequence[bool], name: str = "acc") -> dict[str, float]:
    """Return the share of True as `name`, and its standard error, sqrt(p (1 - p) / (n - 1)); nan for one item."""
    n = len(correct)
    p = sum(correct) / n
    return {name: p, f"{name}_stderr": math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else math.nan}


def perplexity(nats: float) -> float:
    """Return exp(nats), or a large number where that would overflow."""
    return math.exp(min(nats, 700.0))  # e^709 is the largest float


def interleave_ranks(shares: Sequence[Sequence[T]]) -> list[T]:
    """Return the results of all items in order, where `shares[rank]` has those of `items[rank::world_size]`."""
    return [shares[i % len(shares)][i // len(shares)] for i in range(sum(map(len, shares)))]


def encode(tokenizer: Tokenizer, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[list[int]]:
    """Return each text's token ids. Special tokens that occur in a text are encoded as ordinary text."""
    if not texts:
        return []
    # verbose=False: do not warn about texts longer than the model's context, which are truncated later.
    options = {"add_special_tokens": add_special_tokens, "split_special_tokens": True, "verbose": False}
    return tokenizer(list(texts), **options)["input_ids"]


def encode_together(tokenizer: Tokenizer, pairs: Sequence[tuple[str, Sequence[str]]]) -> list[Request]:
    """Make requests from (context, continuations) texts as lm-evaluation-harness does (TemplateLM._encode_pair).

    Context and continuation are encoded as one text, with a beginning-of-text token if the tokenizer adds one. The
    continuation is what follows the context's own tokens. White space at the end of a context is moved to it.
    """
    stripped = []
    for text, continuations in pairs:
        context = text.rstrip()
        stripped.append((context, [text[len(context) :] + continuation for continuation in continuations]))
    contexts = encode(tokenizer, [context for context, _ in stripped], add_special_tokens=True)
    full_texts = [context + text for context, texts in stripped for text in texts]
    full_ids = iter(encode(tokenizer, full_texts, add_special_tokens=True))
    return [
        Request(tokens, [next(full_ids)[len(tokens) :] for _ in texts])
        for tokens, (_, texts) in zip(contexts, stripped, strict=True)
    ]


def task_names() -> list[str]:
    """Return the names of all tasks."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/task.py"))


def task_class(name: str) -> type[BaseTask]:
    """Return the class of a task. Raises EvalError if it does not exist."""
    names = task_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(names)}, lm-eval:NAME"
        raise EvalError(f"unknown task {name!r}; {hint}")
    return importlib.import_module(f"eval.{name}.task").Task
