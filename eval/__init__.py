"""
How good a model is: `python -m eval --model CHECKPOINT --tasks hellaswag`.

    scoring.py      log-likelihoods of continuations, in batches: what every task stands on
    validation.py   the loss on text that the model has not seen
    samples.py      text that a model writes, to be read by a person
    hub.py          whether the Hugging Face Hub can be reached, asked once and quickly
    hellaswag/      items, the four endings' log-likelihoods, and the metric that `evaluate.load` opens
    __main__.py     the command

Everything here takes a model and a tokenizer as arguments, and knows nothing of how they were made. Import as
`from eval.scoring import loglikelihoods`: a bare `import eval.scoring` would shadow Python's own `eval`.
"""


class EvalError(ValueError):
    """Something the user can mend; the commands show its message on one line, without a traceback."""
