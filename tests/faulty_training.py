"""
A program for test_skipping.py: run train.py with faults, which the first argument describes as JSON.

    nan_losses       forward passes of training whose loss is NaN, counted from 0 (two per step and process)
    inf_gradients    forward passes of training whose gradient is infinite
    nan_validations  validations whose loss is NaN, counted from 0
    failed_scorings  scorings of HellaSwag that find log-likelihoods that are not finite
    sigterm_at       the step (steps taken before it) at whose start the main process gets SIGTERM

The other arguments are train.py's.
"""

import itertools
import json
import os
import signal
import sys

import eval.during_training as during_training
import train
from eval.scoring import NotFiniteError

nothing = {"nan_losses": [], "inf_gradients": [], "nan_validations": [], "failed_scorings": [], "sigterm_at": None}
faults = nothing | json.loads(sys.argv.pop(1))
forward, training_passes = train.GPT2ReproForCausalLM.forward, itertools.count()
score_items, scorings = during_training.score_items, itertools.count()
validation_loss, validations = during_training.validation_loss, itertools.count()
learning_rate = train.learning_rate


def faulty_forward(self, *args, **kwargs):
    output = forward(self, *args, **kwargs)
    if self.training:
        number = next(training_passes)
        if number in faults["nan_losses"]:
            output.loss = output.loss * float("nan")
        if number in faults["inf_gradients"]:
            output.loss.register_hook(lambda gradient: gradient * float("inf"))
    return output


def faulty_score_items(task, *args, **kwargs):
    if task.name == "hellaswag" and next(scorings) in faults["failed_scorings"]:
        raise NotFiniteError("log-likelihoods are not finite")
    return score_items(task, *args, **kwargs)


def faulty_validation_loss(*args, **kwargs):
    loss_sum, num_tokens = validation_loss(*args, **kwargs)
    return (float("nan") if next(validations) in faults["nan_validations"] else loss_sum), num_tokens


def learning_rate_and_signal(step, *args):  # called once at the start of a step
    if step == faults["sigterm_at"] and os.environ.get("RANK", "0") == "0":
        os.kill(os.getpid(), signal.SIGTERM)
    return learning_rate(step, *args)


train.GPT2ReproForCausalLM.forward = faulty_forward
during_training.score_items = faulty_score_items
during_training.validation_loss = faulty_validation_loss
train.learning_rate = learning_rate_and_signal
if __name__ == "__main__":
    sys.exit(train.main())
