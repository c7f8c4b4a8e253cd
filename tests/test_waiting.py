"""The host reads a step's numbers from the device once, after the optimizer step, and waits for nothing else."""

import json

import torch
from tiny_run import ROOT


def test_one_read_from_the_device_per_step(launch, small, tmp_path):
    done = launch(
        *("--config", small, "--output_dir", tmp_path / "run", "--optim.muon_lr", "0.02"),
        *("--max_steps", "8", "--eval_every", "100", "--save_every", "100"),
        script=ROOT / "tests" / "count_device_reads.py",
        environment={"PYTHONPATH": str(ROOT)},
    )
    counts = json.loads(done.stdout.splitlines()[-1])
    assert len(counts) == 7
    expected = [1, 1 if torch.cuda.is_available() else 0]
    assert counts[1:] == [expected] * 6  # the first step may prepare something
