"""The benchmarks start, print their columns, and compare runs correctly. Their timings are not tested."""

import argparse
import dataclasses
import importlib
import json
import math
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny_run import ROOT

from benchmarks import gpu_check, harness, loop_overhead, race, tokenization, train_step
from common.markdown import table
from training.config import load_config
from training.distributed import isolated_accelerator_state

NAMES = sorted({path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"__init__", "harness", "plain_gpt2"})


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
    monkeypatch.setattr(train_step, "matmul_ceiling", lambda *_: 1e12)
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
    monkeypatch.setattr(train_step, "matmul_ceiling", lambda *_: 1e12)
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


def test_loop_overhead_times_each_part_of_a_run(launch, tiny, tmp_path):
    short = ("--max_steps", 2, "--eval.hellaswag", "null", "--eval.prompts", "[]", "--eval.ngram_baselines", "false")
    options = ("--config", tiny, "--output_dir", tmp_path / "run", *short)
    lines = launch("benchmarks.loop_overhead", *options, script="-m").stdout.splitlines()[-6:]
    assert [line[:10].strip() for line in lines] == ["step", *loop_overhead.PARTS, "the rest"]
    step, *parts, rest = (float(line[10:].split()[0]) for line in lines)
    assert all(part > 0 for part in parts) and sum(parts) < step and 0 < rest < step


# ---------------------------------------------------------------------------------------------------------------
# race

SAMPLE = ["--config", str(ROOT / "recipes" / "sample.yaml")]


def curve(*losses):
    """A run with an evaluation every 100 tokens and every second."""
    return [race.Point(100 * number, number, loss) for number, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "ratio"),
    [
        ((10.0, 8.0, 6.0), 0.5),
        ((10.0, 9.5, 7.5), 0.5 * 1.75),  # on a straight line between evaluations
        ((10.0, 9.0, 8.5), None),
        ((10.0, 7.0, 9.0), None),  # reached, and left again
        ((10.0, 7.0, math.inf), None),
        ((math.inf, 8.0, 8.0), 0.5),
    ],
)
def test_race_ratios_to_the_reference(losses, ratio):
    reference, row = race.compare({"adamw": {1: curve(10.0, 9.0, 8.0)}, "other": {1: curve(*losses)}})
    assert reference["token_ratio"] == reference["time_ratio"] == [1.0]
    assert row["token_ratio"] == row["time_ratio"] == [ratio]
    assert row["loss"] == [losses[-1]] and row["difference"] == [losses[-1] - 8.0] and row["tokens"] == [200]


def test_race_curve_has_seconds_of_steps_and_ends_infinite_for_a_diverged_run():
    records = [{"tokens": 0, "val_loss": 9.0, "seconds": 5}, {"tokens": 100, "ms": 1500, "loss": 8.0}]
    records += [{"tokens": 100, "val_loss": None}, {"tokens": 200, "ms": 500, "loss": 8.0}]
    points = [(0, 0.0, 9.0), (100, 1.5, math.inf)]
    assert race.validation_curve(records, True) == points
    assert race.validation_curve(records, False) == [*points, (200, 2.0, math.inf)]


def test_race_trains_each_seed_in_turn_and_prints_a_table(run, tmp_path, monkeypatch):
    losses = {"adamw": (10.0, 9.0, 8.0), "fast": (10.0, 8.0, 6.0), "failing": (10.0, 8.0)}
    commands = []

    def train(folder, settings, launch, config):
        name, seed = folder.parent.name, config.seed
        commands.append((name, seed, settings))
        folder.mkdir(parents=True)
        hardware = dict.fromkeys(("processes", "device", "cpu_count", "mixed_precision"))
        provenance = {"hardware": hardware, "code": None, "versions": {"torch": f"2.{seed}"}}
        (folder / "provenance.json").write_text(json.dumps(provenance))
        records = [{"step": n, "tokens": 100 * n, "val_loss": x - seed / 100} for n, x in enumerate(losses[name])]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r | {"ms": 1000}) + "\n" for r in records))
        return name != "failing"

    monkeypatch.setattr(race, "train", train)
    more = ["--optim.lr", "1e-2", "--optim.betas", "[0.9, 0.99]"]
    runners = [f"adamw={SAMPLE[1]}", f"fast={SAMPLE[1]},optim.lr=1e-2,optim.betas=[0.9, 0.99]", f"failing={SAMPLE[1]}"]
    output = run("race", *runners, "--seeds", 1, 2, "--out", tmp_path)
    assert commands[:2] == [("adamw", 1, SAMPLE), ("fast", 1, [*SAMPLE, *more])]
    assert [command[:2] for command in commands[2:]] == [("failing", 1), ("adamw", 2), ("fast", 2), ("failing", 2)]
    assert "torch 2.1" in output and "torch 2.2" in output  # a warning: not one environment
    assert "| fast | 2 | 200 | 5.9850 ± 0.0071 | -2.0000 ± 0.0000 | 0.50 ± 0.00 | 0.67 ± 0.00 |" in output
    assert f"| failing | 2 | 100 {'| not reached by 2 of 2 ' * 4}|" in output
    assert json.loads((tmp_path / "race.json").read_text())["rows"][2]["loss"] == [None, None]
    assert (tmp_path / "race.png").stat().st_size > 10_000


def test_race_refuses_a_folder_with_other_settings(tmp_path):
    config = race.check(tmp_path / "new", SAMPLE, 1)
    (tmp_path / "provenance.json").write_text(json.dumps({"config": dataclasses.asdict(config)}))
    assert race.check(tmp_path, SAMPLE, 1) == config
    with pytest.raises(SystemExit, match=r"other settings \(optim\)"):
        race.check(tmp_path, [*SAMPLE, "--optim.lr", "1e-4"], 1)
    with pytest.raises(SystemExit, match=r"'?optim\.learnrate"):
        race.check(tmp_path / "new", [*SAMPLE, "--optim.learnrate", "1"], 1)


def test_race_refuses_runners_that_are_not_comparable():
    config = load_config(SAMPLE)
    race.check_comparable([config, load_config([*SAMPLE, "--model.dropout", "0.1"])])
    with pytest.raises(SystemExit, match="differ in model"):
        race.check_comparable([config, load_config([*SAMPLE, "--model.n_layer", "3"])])


STEP = {"step": 1, "tokens": 8, "loss": 3.0}
SKIPPED = [{"step": n, "tokens": 8, "loss": None, "skipped": {"in_a_row": n - 1}} for n in (2, 3)]


@pytest.mark.parametrize(
    ("status", "records", "result"),
    [
        (None, [], None),  # did not start
        ("failed", [STEP, SKIPPED[0]], None),
        ("failed", [STEP, *SKIPPED], False),  # max_skipped_steps in a row
        ("failed", [STEP, {"step": 3, "tokens": 8, "val_loss": None}], False),  # diverged at the end
        ("failed", [STEP, {"step": 3, "tokens": 8, "val_loss": 3.0}], None),  # could not save, for instance
        ("resume me", [STEP], None),
        ("finished", [STEP], True),
    ],
)
def test_race_tells_diverged_runs_from_failed_ones(status, records, result, tmp_path, monkeypatch):
    config = load_config([*SAMPLE, "--max_steps", "3", "--optim.max_skipped_steps", "2"])
    folder, launches = tmp_path / "runner" / "1", []

    def launch(*_, **__):
        launches.append(folder)
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
        if status is not None:
            (folder / "status.json").write_text(json.dumps({"status": status}))

    folder.mkdir(parents=True)
    (folder / "status.json").write_text('{"status": "failed"}')  # of an earlier attempt
    monkeypatch.setattr(subprocess, "run", launch)
    for attempt in (1, 2):
        if result is None:
            with pytest.raises(SystemExit, match=r"console\.log"):
                race.train(folder, [], "", config)
        else:
            assert race.train(folder, [], "", config) is result
        assert len(launches) == (attempt if result is None else 1)  # an outcome that counts is not repeated
