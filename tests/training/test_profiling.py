"""`--profile`."""

import gzip
import json

import pytest
import torch

from training import TrainingError
from training.config import load_config
from training.profiling import WARM_UP_STEPS, profiled


def test_profile_records_the_steps_after_the_warm_up(tmp_path, capsys):
    recorded = range(WARM_UP_STEPS, WARM_UP_STEPS + 2)
    batches = (torch.ones(4, 4) for _ in range(9))
    steps = profiled(batches, len(recorded), tmp_path)
    for step, batch in enumerate(steps):
        for _ in range(3):
            (batch.cosh if step in recorded else batch.sinh)()
    trace = json.loads(gzip.decompress((tmp_path / "profile.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("aten::cosh") == 6 and "aten::sinh" not in names
    [row] = [line.split() for line in capsys.readouterr().out.splitlines() if line.endswith("aten::cosh")]
    assert row[2] == "3"  # calls per step


@pytest.mark.parametrize(("num_batches", "line"), [(WARM_UP_STEPS + 1, "profile   1 steps"), (2, "profile   nothing")])
def test_profile_of_fewer_steps_than_requested_says_so(num_batches, line, tmp_path, capsys):
    for batch in profiled((torch.ones(4, 4) for _ in range(num_batches)), 5, tmp_path):
        batch.cosh()
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("num_steps", [2, None])
def test_profile_closes_the_batches(num_steps, tmp_path):
    batches = (number for number in range(9))
    steps = profiled(batches, num_steps, tmp_path)
    next(steps)
    steps.close()
    assert next(batches, None) is None


def test_profile_needs_enough_steps():
    assert load_config(["--max_steps", "9", "--profile", "5"]).profile == 5
    with pytest.raises(TrainingError, match=r"profile=6 needs 10 steps .* got max_steps=9"):
        load_config(["--max_steps", "9", "--profile", "6"])
