"""Training: everything outside train.py that has tests of its own.

    config.py       settings as dataclasses; settings.py reads them from recipes (YAML) and the command line
    distributed.py  the accelerator and its precision, threads and memory on a CPU, run_on_main
    estimate.py     the plan: hardware, FLOPs, memory, time and cost
    batch.py        micro-batches, the largest that fit, and the memory that is free
    optim.py        learning rate, AdamW, Muon, clipping, skipped steps
    sharding.py     wrapping for training; full tensors of FSDP2's shards
    checkpoint.py   checkpoint folders: write, check, find, thin out, load
    run.py          the run's folder (lock, status.json) and requests to stop (signals, time limit)
    logging.py      metrics.jsonl, the console, trackers
    curves.py       curves.png
    report.py       report.html
    provenance.py   provenance.json: settings, code, versions, hardware, data

Independent of the data's format and of the evaluation: train.py combines the packages.
"""

from common.errors import UserError


class TrainingError(UserError):
    """An error of a run that the user can fix."""
