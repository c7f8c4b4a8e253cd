"""Runs that are killed, asked to stop, damaged, or given a full disk: nothing is lost, and the curve is the same."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys

import pytest
from killing import assert_same_run, kill_at_random, start, wait_for_step
from tiny_run import ROOT, clean_environment, losses

from training.stopping import RESUME_ME

# Saves at every second step, so that a random moment is often one of saving; dropout, so that the random state counts.
STEPS = 60
OFTEN = (
    *("--max_steps", STEPS, "--save_every", 3, "--eval_every", 6, "--keep_last", 2),
    *("--model.dropout", 0.1, "--eval.hellaswag", "null"),
)


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """A run with the settings above that nobody disturbs."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    run = start(output, output.parent, "--config", tiny, *OFTEN)
    assert run.wait(timeout=300) == 0, output.with_suffix(".log").read_text()
    return output


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_killed_five_times_at_random_moments(tiny, undisturbed, tmp_path, seed):
    output = tmp_path / "run"
    kill_at_random(output, tmp_path, "--config", tiny, *OFTEN, random=random.Random(seed), most_seconds=2, times=5)
    assert_same_run(output, undisturbed, STEPS)
    names = [sorted(p.name for p in (run / "checkpoints").iterdir()) for run in (output, undisturbed)]
    assert names[0] == names[1]
