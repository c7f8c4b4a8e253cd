"""
How the model is trained: everything that has a test of its own outside train.py.

    config.py       a run's settings: dataclasses, recipe YAML, command line
    schedule.py     the learning rate, a pure function of the step
    optim.py        AdamW with weight decay on matrices only
    precision.py    what "auto" mixed precision means on this hardware
    checkpoint.py   checkpoint folders: written aside and renamed, found, resumed
    metrics.py      metrics.jsonl and curves.png
    provenance.py   provenance.json: what made this run

Knows nothing of the model's class, the data's format or the evaluation: train.py puts the rooms together.
"""


class TrainingError(ValueError):
    """Something the user can mend; train.py shows its message on one line, without a traceback."""
