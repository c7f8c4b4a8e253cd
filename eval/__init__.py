"""Model evaluation: `python -m eval --model CHECKPOINT --tasks hellaswag`, or `eval.evaluate(model, tokenizer)`.

    scoring.py          log-likelihoods of continuations, in batches; every task is built on it
    task.py, items.py   the base class of tasks; reading items from the Hub and from files
    windows.py          a long text in windows that fit the model
    hellaswag/          which of four endings follows, as build-nanogpt, llm.c and lm-eval score it
    lambada/            the last word of a passage
    blimp/              which of two sentences is grammatical; python -m eval.blimp prints it by paradigm
    wikitext/           perplexity of WikiText-2, as lm-eval and transformers' documentation compute it
    core/               22 tasks with few-shot prompts, as nanochat scores them
    bits_per_byte/      loss and bits per byte of any text or shards
    lm_eval_bridge.py   any task of the package lm-eval
    evaluator.py        `evaluate`: tasks in, a dict of results out
    __main__.py         the command `python -m eval`; command.py has what it shares with the miniseries
    miniseries.py       python -m eval.miniseries: scores over model size; law.py: the scaling law through losses
    published.py        OpenAI's results
    during_training.py  what train.py evaluates: validation loss, tasks, samples

Everything here takes a model and a tokenizer as arguments and does not know how they were made. Write
`from eval.scoring import loglikelihoods`: a bare `import eval.scoring` would shadow Python's built-in `eval`.
"""

from typing import Any

from common.errors import UserError


class EvalError(UserError):
    """An error about evaluation that the user can fix."""


def __getattr__(name: str) -> Any:
    """Import `evaluate` on first use, so that commands and `import eval` start without torch."""
    if name == "evaluate":
        from eval.evaluator import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["EvalError", "evaluate"]
