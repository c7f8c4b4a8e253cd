"""The benchmarks start, and print their columns. Their timings are not tested."""

import argparse
import importlib
import json
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny_run import ROOT

from benchmarks import gpu_check, harness, tokenization, train_step
from common.markdown import table
from training import estimate
from training.distributed import isolated_accelerator_state

NAMES = sorted(
    {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"__init__", "harness", "plain_gpt2", "runs"}
)


@pytest.fixture
def run(monkeypatch, capsys):
    """run(name, *arguments) runs a benchmark's `main` in this process and returns its output."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}.py", *map(str, arguments)])
        try:
            importlib.import_module(f"benchmarks.{name}").main()
        except SystemExit as stop:
            assert not stop.code, stop.code
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_the_command(name, run):
    assert f"    python -m benchmarks.{name} " in run(name, "--help")


def test_candidates_take_turns_and_ratios_are_within_a_round():
    speeds = {"a": iter([1.0, 10.0, 4.0]), "b": iter([2.0, 40.0, 8.0])}
    turns = []

    def measure(name):
        turns.append(name)
        return next(speeds[name])

    results = harness.take_turns({name: partial(measure, name) for name in speeds}, 3, str)
    assert turns == ["a", "b"] * 3
    assert harness.with_range(results["b"], ",.1f") == "8.0 (2.0 to 40.0)"
    assert harness.median_ratio(results["b"], results["a"]) == "2.00"
    assert harness.median_ratio(results["b"], []) == "-"
    assert table(("x", "y"), [(1, "a"), (2, "b")]) == "| x | y |\n|---|---|\n| 1 | a |\n| 2 | b |"


def test_train_step_prints_a_row_per_candidate(run, monkeypatch):
    monkeypatch.setattr(train_step, "run_turn", lambda turn: train_step.measure_turn(SimpleNamespace(**turn)))
    monkeypatch.setattr(estimate, "measure_matmul_flops", lambda *_: 1e12)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)  # would stay set for other tests
    candidates = ["ours", "transformers", f"script:{ROOT / 'tests' / 'lecture_script.py'}"]
    small = ("--size", "tiny", "--batch", 1, "--seq_len", 16, "--steps", 1, "--rounds", 1, "--no-compiled")
    lines = run("train_step", *small, "--candidates", *candidates).splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines[-3:]]
    assert [row[:2] for row in rows] == [[candidate, "eager"] for candidate in candidates]
    assert rows[1][5:] == ["1.00", "1.00"] and len(rows[0]) == len(train_step.COLUMNS)


TINY_CHECK = ("--size", "tiny", "--batch", 2, "--seq_len", 32, "--steps", 1, "--rounds", 1, "--items", 5)


def test_gpu_check_continues_with_the_missing_parts(run, tiny, tmp_path, monkeypatch):
    def start_part(name, out, settings, limit):  # in this process
        with isolated_accelerator_state():
            gpu_check.run_part(name, argparse.Namespace(**settings, out=out))

    monkeypatch.setattr(gpu_check, "start_part", start_part)
    monkeypatch.setattr(gpu_check, "NUM_LOSSES", 3)
    monkeypatch.setattr(estimate, "measure_matmul_flops", lambda *_: 1e12)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)  # would stay set for other tests
    (tmp_path / "shards").symlink_to(tiny.parent / "shards")
    command = ("gpu_check", "--out", tmp_path, "--no-compiled", *TINY_CHECK)
    run(*command, "--parts", "machine", "steps")
    results = json.loads((tmp_path / "steps.json").read_text())
    ours, transformers, plain = (row["first loss"] for row in results["candidates"].values())
    assert transformers == pytest.approx(ours, abs=1e-3)
    assert plain == pytest.approx(ours + 47 / 50304, abs=1e-3)  # its padding has 47 more tokens
    assert all(row["tokens/s"][0] > 0 and "error" not in row for row in results["candidates"].values())
    output = run(*command, "--parts", "machine", "steps", "hellaswag")
    assert output.startswith("machine    is there already\nsteps      is there already\nhellaswag  ")
    assert "\n| plain eager | 10." in output and "\n## train: not run\n" in output
    assert "machine    no time left" in run(*command, "--parts", "machine", "--seq_len", 16, "--minutes", 0)


@pytest.mark.slow
def test_gpu_check_runs_every_part_in_a_process(launch, tiny, tmp_path):
    (tmp_path / "shards").symlink_to(tiny.parent / "shards")
    output = launch("benchmarks.gpu_check", "--out", tmp_path, "--no-compiled", *TINY_CHECK, script="-m").stdout
    assert [line.split()[1] for line in output.splitlines()[:4]] == ["done"] * 4, output
    assert "| was killed | True |" in output and "| off the first run | 0 |" in output


def test_tokenization_prints_a_row_per_candidate(run, tmp_path):
    (tmp_path / "text.txt").write_text("\n--\n".join(f"Document {i} of many words." for i in range(400)))
    options = ("--separator", r"\n--\n", "--rounds", 1, "--num_proc", 1)
    output = run("tokenization", tmp_path / "text.txt", *options, "--candidates", "tiktoken", "prepare")
    assert output.startswith("400 documents, ") and "\n| prepare | " in output
    assert f"\n| {' | '.join(tokenization.COLUMNS)} |\n" in output
