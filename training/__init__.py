"""
How the model is trained: everything that has a test of its own outside train.py.

    config.py       a run's settings, as dataclasses
    settings.py     reads them from recipes (YAML) and the command line; setting_names.py: other projects' names
    launch.py       this process and the others: found, acted as one with, left
    plan.py         what a run will take: memory, time, money
    hardware.py     what a device can do at best, and what it costs
    microbatch.py   how a step's batch is cut, the largest pieces that fit where asked
    precision.py    what "auto" mixed precision means on this hardware
    cpu.py          what a run on a CPU arranges by itself
    schedule.py     the learning rate, a pure function of the step
    optim.py        AdamW with weight decay on matrices only
    skipping.py     which windows a skipped step was to learn from
    state.py        compiled and wrapped for training; what was learnt, as whole tensors by name
    zero.py         what DeepSpeed's ZeRO does differently
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
