"""
How good a model is: `python -m eval --model CHECKPOINT --tasks hellaswag`, or `eval.evaluate(model, tokenizer)`.

    scoring.py          log-likelihoods of continuations, in batches: what every task stands on
    task.py, items.py   what a task is; where its items come from
    hellaswag/          which of four endings follows: as build-nanogpt and llm.c score it, and as lm-eval does
    lambada/            the last word of a passage
    bits_per_byte/      validation loss and bits per byte of any text or shards
    lm_eval_bridge.py   any task of the package lm-eval
    evaluator.py        `evaluate`: tasks to a dict of results, processes.py: together with other processes
    __main__.py         the command; command.py: what it shares with the other one; checkpoint.py: the model to score
    miniseries.py       python -m eval.miniseries: scores over model size; published.py: OpenAI's figures
    validation.py       training's own validation loss; samples.py: text that a model writes
    hub.py              whether the Hugging Face Hub can be reached, asked once and quickly

Everything here takes a model and a tokenizer as arguments, and knows nothing of how they were made. Each task's folder
is also a metric that `evaluate.load("eval/NAME")` opens. Import as `from eval.scoring import loglikelihoods`: a bare
`import eval.scoring` would shadow Python's own `eval`.
"""

from common.errors import UserError


class EvalError(UserError):
    """An error about scoring that the user can fix."""


def __getattr__(name: str):
    """Import `evaluate` when it is first used: the commands and `import eval` start without torch."""
    if name == "evaluate":
        from eval.evaluator import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["EvalError", "evaluate"]
