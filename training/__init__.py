"""
How the model is trained: everything that has a test of its own outside train.py.

    config.py       a run's settings, as dataclasses
    settings.py     reads them from recipes (YAML) and the command line; setting_names.py: other projects' names
    distributed.py  the accelerator and its precision, threads and memory on a CPU, the main process
    estimate.py     hardware, FLOPs, memory, time and cost, before the first step
    batch.py        micro-batches, and the largest that fit
    optim.py        learning rate, AdamW, Muon, skipped steps
    sharding.py     wrapping for training; full tensors of FSDP2's shards
    checkpoint.py   checkpoint folders: whole or not there, checked, found, thinned out
    run.py          the run's folder (lock, status.json) and requests to stop (signals, time limit)
    logging.py      metrics.jsonl, the console, trackers
    curves.py       curves.png
    provenance.py   provenance.json: settings, code, versions, hardware, data

Knows nothing of the model's class, the data's format or the evaluation: train.py puts the rooms together.
"""

from common.errors import UserError


class TrainingError(UserError):
    """An error of a run that the user can fix."""
