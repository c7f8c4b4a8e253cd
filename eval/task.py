"""
What a task is. Each has a folder and in it `task.py` with a class `Task` that derives from the one here; being there is
all it takes for `python -m eval --tasks NAME` and `eval.evaluate` to know it. CONTRIBUTING.md has an example.
"""

import difflib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from eval import EvalError
from eval.scoring import Request, loglikelihoods


@dataclass(frozen=True)
class Item:
    """One question."""

    requests: list[Request]
    """what the model is to score"""
    reference: dict
    """what the answer is made from beside the scores: the right choice, lengths, ..."""


@dataclass(frozen=True, kw_only=True)
class BaseTask:
    """Questions, and what counts of the answers. A task's settings are its fields."""

    data: str = "hub"
    """where the items come from: "hub", or a file or folder that the task can read"""
    limit: int | None = None
    """score only the first so many items"""

    version: ClassVar[int]
    """counted up when a change moves the numbers"""
    figures: ClassVar[dict[str, str]]
    """name of each number that `results` gives: what it is, and whose convention"""
    full_size: ClassVar[int | None] = None
    """items of the set that published numbers are of, if there is one"""

    @property
    def name(self):
        """Its folder's."""
        return type(self).__module__.split(".")[-2]

    def load(self, tokenizer, max_inputs=None):
        """
        Args:
            tokenizer: a Hugging Face tokenizer, the model's.
            max_inputs: tokens that fit the model's context; None for no limit.

        Returns:
            (list of Item, eval.items.Source)

        Raises:
            EvalError: the items are not there, one is not what it should be, or does not fit (the message names it).
        """
        items, source = self.read(tokenizer, max_inputs)
        for number, item in enumerate(items):
            longest = max(len(tokens) for request in item.requests for tokens in request.continuations)
            if max_inputs is not None and longest > max_inputs:
                raise EvalError(
                    f"item {number} (counted from 0) has {longest} tokens to score, and the model's context holds "
                    f"{max_inputs}: score it on other items, or a model with a longer context"
                )
        return items, source

    def read(self, tokenizer, max_inputs):
        """What `load` gives, before it has looked whether all fits."""
        raise NotImplementedError

    def answer(self, item, scores):
        """
        Args:
            scores: for each of the item's requests, a list of a ContinuationScore a continuation.

        Returns:
            dict, JSON-able: what `results` counts, and what `--per_item` writes.
        """
        raise NotImplementedError

    def results(self, answers):
        """
        Args:
            answers: list of what `answer` gave, one or more, in the order of the items.

        Returns:
            dict: the figures, NAME_stderr for those that have a standard error, and n.
        """
        raise NotImplementedError


def answer_items(task, model, items, *, tokens_per_batch=None, on_batch=None):
    """
    Args:
        task: a BaseTask.
        items: list of its Items, for instance a process's share `items[rank::world_size]`; may be empty.
        model, tokens_per_batch, on_batch: as for `loglikelihoods`.

    Returns:
        list of dict: the task's answers in order, each with "tokens_cut", those lost to the model's context.

    Raises:
        EvalError: as `loglikelihoods`.
    """
    requests = [request for item in items for request in item.requests]
    scores = loglikelihoods(model, requests, tokens_per_batch=tokens_per_batch, on_batch=on_batch)
    remaining = iter(scores)
    answers = []
    for item in items:
        of_item = [next(remaining) for _ in item.requests]
        tokens_cut = max(score.num_cut for of_request in of_item for score in of_request)
        answers.append(task.answer(item, of_item) | {"tokens_cut": tokens_cut})
    return answers


def in_order(shares):
    """The answers of all items, from those that process r of W gave for items[r::W], by r."""
    return [shares[i % len(shares)][i // len(shares)] for i in range(sum(map(len, shares)))]


def joint_results(task, answers):
    """The task's results, and "num_cut": how many items lost their beginning to the model's context."""
    return task.results(answers) | {"num_cut": sum(answer["tokens_cut"] > 0 for answer in answers)}


def encode(tokenizer, texts, *, add_special_tokens=False):
    """Token ids of each text. Nothing in it is taken for a special token, and none is added unless asked for."""
    if not texts:
        return []
    # verbose=False: a text may be longer than the model's context, which is cut later.
    options = {"add_special_tokens": add_special_tokens, "split_special_tokens": True, "verbose": False}
    return tokenizer(texts, **options)["input_ids"]


def encode_together(tokenizer, pairs):
    """
    Requests from texts as lm-evaluation-harness makes them (TemplateLM._encode_pair): context and continuation are
    encoded as one text, with a beginning-of-text token if the tokenizer puts one there by itself (GPT-2's does not);
    what comes after the context's own tokens is the continuation. White space at a context's end goes to it too.

    Args:
        pairs: list of (context, [continuations]), texts.

    Returns:
        list of Request.
    """
    pairs = [
        (context.rstrip(), [context[len(context.rstrip()) :] + text for text in texts]) for context, texts in pairs
    ]
    contexts = encode(tokenizer, [context for context, _ in pairs], add_special_tokens=True)
    wholes = [context + text for context, texts in pairs for text in texts]
    wholes = iter(encode(tokenizer, wholes, add_special_tokens=True))
    return [
        Request(tokens, [next(wholes)[len(tokens) :] for _ in texts])
        for tokens, (_, texts) in zip(contexts, pairs, strict=True)
    ]


def task_names():
    """All there are."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/task.py"))


def task_class(name):
    """
    The class of a task.

    Raises:
        EvalError: no such task.
    """
    names = task_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names)}, and lm-eval:NAME"
        raise EvalError(f"no task {name!r}; {hint}")
    return importlib.import_module(f"eval.{name}.task").Task
