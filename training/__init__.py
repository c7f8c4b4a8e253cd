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
    stopping.py     signals and time limits: save, and ask to be resumed
    run_folder.py   one run at a time; status.json
    run_log.py      all that a run tells, by these:
    progress.py     what someone who watches sees
    metrics.py      metrics.jsonl
    curves.py       curves.png
    trackers.py     TensorBoard, W&B, Trackio
    provenance.py   provenance.json: what made this run

Knows nothing of the model's class, the data's format or the evaluation: train.py puts the rooms together.
"""

from common.errors import UserError


class TrainingError(UserError):
    """An error of a run that the user can fix."""
