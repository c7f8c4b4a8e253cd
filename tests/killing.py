"""Shared by the tests of stopping and resuming: start a run in its own process group, kill it, compare it."""

import json
import os
import signal
import subprocess
import sys
import time

import torch
from safetensors.torch import load_file
from tiny_run import ROOT, clean_environment, records

TIMES = ("ms", "tokens_per_s", "seconds", "hellaswag_seconds")
WHOLE = ("model.safetensors", "training_state/optimizer.safetensors", "training_state/rng.safetensors")


def start(output, home, *arguments, through=()):
    """Start a run in the background. `through`: arguments of Python before train.py."""
    log = output.with_suffix(".log").open("a")
    return subprocess.Popen(
        [sys.executable, *through, "train.py", *map(str, arguments), "--output_dir", output, "--resume", "auto"],
        cwd=ROOT,
        env=clean_environment(home),
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def kill_at_random(output, home, *arguments, random, most_seconds, times):
    """Kill a run with SIGKILL several times, at random moments after it has found its checkpoint; then let it finish.

    Returns:
        The steps that were done when it was killed.
    """
    killed_at = []
    while True:
        run = start(output, home, *arguments)
        if len(killed_at) == times:
            assert run.wait(timeout=300) == 0, output.with_suffix(".log").read_text()
            return killed_at
        wait_for(lambda run=run: status(output).get("pid") == run.pid, output, run)
        try:
            run.wait(timeout=random.uniform(0, most_seconds))
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            lines = (output / "metrics.jsonl").read_text().splitlines()
            killed_at.append(json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0)
        else:
            raise AssertionError(f"done before it was killed {times} times, only at {killed_at}: give it more steps")


def status(output):
    """status.json, or {} where there is none yet."""
    return json.loads((output / "status.json").read_text()) if (output / "status.json").is_file() else {}


def wait_for(condition, output, run, timeout=120):
    """Returns when the condition is true; an AssertionError with the log when the run ends before or takes too long."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert run.poll() is None, output.with_suffix(".log").read_text()
        assert time.monotonic() < deadline, output.with_suffix(".log").read_text()
        time.sleep(0.01)


def wait_for_step(output, step, run):
    """Returns when metrics.jsonl has the step."""
    metrics = output / "metrics.jsonl"
    wait_for(lambda: metrics.is_file() and f'{{"step": {step},' in metrics.read_text(), output, run)


def assert_same_run(output, reference, step):
    """Parameters, moments and random states bit by bit; each step and evaluation once, with the same numbers."""
    for name in WHOLE:
        expected, got = (load_file(run / "checkpoints" / f"step_{step:06d}" / name) for run in (reference, output))
        assert expected.keys() == got.keys()
        for key in expected:
            assert torch.equal(expected[key], got[key]), f"{name}: {key}"
    expected, got = (
        [{k: v for k, v in record.items() if k not in TIMES} for record in records(run)] for run in (reference, output)
    )
    assert got == expected
    hidden = [path for path in (output / "checkpoints").iterdir() if path.name.startswith(".")]
    assert not hidden, hidden
