"""benchmarks/race.py: which runs a plan has, which of them are trained, and what their results say."""

import json
import math
import sys

import pytest
import yaml
from tiny_run import ROOT

from benchmarks import race, runs
from common.errors import UserError
from common.files import write_json
from data.manifest import dataset_fingerprint

COMMON = {"batch.tokens_per_step": 256, "batch.seq_len": 32, "model.n_positions": 32, "warmup": 0.1}
PLAN = {
    "settings": COMMON,
    "sizes": {"S": {"model.n_embd": 32, "tokens": 5120}, "M": {"model.n_embd": 64, "tokens": 10240}},
    "seeds": [1, 2],
    "recipes": {"adamw": {"optim.lr": 2e-3}, "fast": {"optim.lr": 1e-2, "shares": [0.5, 1]}},
}


@pytest.fixture
def plan(tiny, tmp_path):
    """plan(**changes) writes a plan and returns its path."""

    def write(**changes):
        content = {**PLAN, **changes}
        content["settings"] = content["settings"] | {"data.path": str(tiny.parent / "shards")}
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


def test_plan_has_every_recipe_share_size_and_seed(plan):
    planned = runs.read_plan(plan()).runs
    names = ["S-adamw-1", "S-fast@0.5-1", "S-fast-1", "S-adamw-2", "S-fast@0.5-2", "S-fast-2"]
    assert [run.name for run in planned] == names + [name.replace("S", "M", 1) for name in names]
    half, full = planned[1].settings, planned[8].settings
    assert (half["max_steps"], half["optim.warmup_steps"], half["eval_every"]) == (10, 1, 2)
    assert (full["max_steps"], full["optim.warmup_steps"], full["eval_every"]) == (40, 4, 8)
    assert full["optim.lr"] == 1e-2 and full["model.n_embd"] == 64 and full["seed"] == 1 and "shares" not in full


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": {}}, "a plan has the keys"),
        ({"sizes": {"S": {}}}, "tokens is missing"),
        ({"recipes": {"adamw": {"optim.learnrate": 1}}}, r"optim\.learnrate"),
    ],
)
def test_mistakes_in_a_plan_are_one_line(changes, message, plan, tmp_path):
    trainer = runs.Trainer(tmp_path / "results", tmp_path / "out", 1, [], {})
    with pytest.raises(UserError, match=message):
        trainer.result(runs.read_plan(plan(**changes)).runs[0])


LOSSES = [(0, 10.8), (2560, 9.0), (5120, 8.0)]


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """command(plan, *options) runs the race; trainings write a finished run. Returns (output, folders trained)."""
    launched = []

    def launch(self, run, folder, *options):
        launched.append(folder.name)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(run.settings))
        write_json(folder / "status.json", {"status": "finished"})
        data = dataset_fingerprint(run.settings["data.path"])
        model = {"parameters": 1000, "flops_per_token": 6000}
        provenance = {"model": model, "data": data, "code": None, "hardware": {"cpu_threads": 1}}
        write_json(folder / "provenance.json", provenance)
        steps = [{"step": n, "tokens": 256 * n, "loss": 8.0, "ms": 100.0} for n in range(1, 21)]
        evaluations = [{"step": tokens // 256, "tokens": tokens, "val_loss": loss} for tokens, loss in LOSSES]
        records = sorted(steps + evaluations, key=lambda record: record["step"])
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))

    def start(path, *options):
        launched.clear()
        folders = ("--out", tmp_path / "out", "--results", tmp_path / "results")
        monkeypatch.setattr(sys, "argv", ["benchmarks/race.py", *map(str, [path, *folders, *options])])
        assert race.main() == 0
        return capsys.readouterr().out, [*launched]

    monkeypatch.setattr(runs.Trainer, "_launch_training", launch)
    return start


def test_diverged_run_has_a_result(command, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "LOSSES", [(0, 10.8), (5120, None)])
    few = {"sizes": {"S": PLAN["sizes"]["S"]}, "recipes": {"adamw": {"optim.lr": 2e-3}}, "seeds": [1]}
    command(plan(**few))
    assert json.loads((tmp_path / "results" / "S-adamw-1.json").read_text())["losses"] == [[0, 10.8], [5120, None]]
    assert command(plan(**few))[1] == []


def test_race_trains_each_run_once_and_keeps_its_result(command, plan, tmp_path):
    few = {"sizes": {"S": PLAN["sizes"]["S"]}, "recipes": {"adamw": {"optim.lr": 2e-3}, "other": {"optim.lr": 1e-2}}}
    output, launched = command(plan(**few), "--jobs", 2)
    names = ["S-adamw-1", "S-other-1", "S-adamw-2", "S-other-2"]
    assert launched[0] == "rate-S" and sorted(launched[1:]) == sorted(names)
    assert "4 runs, 0 of them done" in output and "| other | 2 | 5,120 |" in output
    result = json.loads((tmp_path / "results" / "S-other-2.json").read_text())
    assert result["losses"] == [list(point) for point in LOSSES]
    assert result["seconds"] == pytest.approx(2.0) and result["flops"] == 6000 * 5120
    assert result["settings"]["optim"]["lr"] == 1e-2 and result["settings"]["seed"] == 2
    assert not (tmp_path / "out" / "S-other-2" / "checkpoints").exists()
    assert (tmp_path / "results.png").stat().st_size > 10_000
    del result["settings"]["eval"]["tasks"]  # a setting that is younger than the result has its default
    write_json(tmp_path / "results" / "S-other-2.json", result)
    assert command(plan(**few))[1] == []  # all of them are there
    few["recipes"]["other"]["optim.lr"] = 2e-2  # other settings: trained again, though the old folders are there
    assert command(plan(**few))[1] == ["rate-S", "S-other-1", "S-other-2"]
    result["data"]["train_sha256"] = "of other data"
    write_json(tmp_path / "results" / "S-adamw-1.json", {**result, "settings": {}})
    assert command(plan(**few), "--plan")[0].startswith("4 runs, 3 of them done")
    recipe = tmp_path / "out" / "S-adamw-1" / "recipe.yaml"
    assert runs._belongs_to(recipe.parent, runs.read_plan(plan(**few)).runs[0])
    provenance = json.loads((recipe.parent / "provenance.json").read_text())
    provenance["data"]["train_sha256"] = "of other data"
    write_json(recipe.parent / "provenance.json", provenance)
    assert not runs._belongs_to(recipe.parent, runs.read_plan(plan(**few)).runs[0])
    assert "| adamw | 1 | 5,120 |" in command(plan(**few), "--table")[0]


STEP = {"step": 1, "tokens": 8, "loss": 3.0}
SKIPPED = [{"step": n, "tokens": 8, "loss": None, "skipped": {"in_a_row": n - 1}} for n in range(2, 12)]


@pytest.mark.parametrize(
    ("status", "records", "result"),
    [
        (None, [], None),  # did not start
        ("failed", [STEP, SKIPPED[0]], None),
        ("failed", [STEP, *SKIPPED], False),  # max_skipped_steps in a row
        ("failed", [STEP, {"step": 20, "tokens": 8, "val_loss": None}], False),  # diverged at the end
        ("failed", [STEP, {"step": 20, "tokens": 8, "val_loss": 3.0}], None),  # could not save, for instance
        ("resume me", [STEP], None),
        ("finished", [STEP], True),
    ],
)
def test_diverged_runs_differ_from_failed_ones(status, records, result, tmp_path, plan):
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    if status is not None:
        (tmp_path / "status.json").write_text(json.dumps({"status": status}))
    assert runs.outcome(tmp_path, runs.read_plan(plan()).runs[2]) is result


def test_a_run_that_fails_ends_the_race(plan, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(runs.Trainer, "rate", lambda self, run: 1.0)
    monkeypatch.setattr(runs.Trainer, "_launch_training", lambda self, run, folder, *options: None)
    assert race.main([str(plan()), "--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]) == 2
    assert "S-adamw-1: the run did not finish; see console.log" in capsys.readouterr().err


def result_of(recipe, tokens, loss):
    """Return a result with only what the comparison reads."""
    outcome = "diverged" if loss is None else "finished"
    losses = [[0, 10.0], [tokens, loss]]
    return {"recipe": recipe, "losses": losses, "outcome": outcome, "flops": 6 * tokens, "seconds": tokens / 100}


def test_crossing_is_on_a_line_in_log_tokens_and_never_extrapolated():
    reference = {seed: result_of("adamw", 1000, 5.0) for seed in (1, 2, 3, 4)}  # no other run has seed 4
    shares = [
        {1: result_of("fast", 250, 5.5), 2: result_of("fast", 250, 5.1), 3: result_of("fast", 250, 4.9)},
        {1: result_of("fast", 500, 4.5), 2: result_of("fast", 500, 5.0), 3: result_of("fast", 500, 4.8)},
    ]
    first, second, third = race.crossing(reference, shares)
    assert first == pytest.approx(math.sqrt(0.25 * 0.5)) and second == pytest.approx(0.5) and math.isnan(third)
    assert race.describe_crossing([first, second, third]) == "not between the shares for 1 of 3"


ADAMW = runs.Run("S", "adamw", 1.0, 1, {})


def test_table_pairs_seeds_and_gives_students_interval():
    by_recipe = {
        "adamw": {1: result_of("adamw", 1000, 5.0), 2: result_of("adamw", 1000, 5.2), 3: result_of("adamw", 1000, 5.1)},
        "fast": {1: result_of("fast", 1000, 4.8), 2: result_of("fast", 1000, 4.9), 3: result_of("fast", 1000, 4.85)},
        "bad": {1: result_of("bad", 500, None)},
    }
    _, fast, bad = race.compare(by_recipe, ADAMW)
    assert fast[1:4] == ["3", "1,000", "4.8500 ± 0.0500"]
    assert fast[4] == "-0.2500 ± 0.1242"  # differences -0.2, -0.3, -0.25: 4.303 x 0.05 / sqrt(3)
    assert fast[7] == "10000" and bad[3] == "inf" and bad[4] == "inf"
    del by_recipe["adamw"]  # nothing takes the place of a missing reference
    assert [row[4:6] for row in race.compare(by_recipe, ADAMW)] == [["", ""], ["", ""]]
    opposite = {"adamw": {1: result_of("adamw", 9, None), 2: result_of("adamw", 9, 5.0)}}
    opposite["fast"] = {1: result_of("fast", 9, 5.0), 2: result_of("fast", 9, None)}
    assert race.compare(opposite, ADAMW)[1][4] == "nan"


def test_plans_in_the_repository_can_be_read(tmp_path):
    trainer = runs.Trainer(tmp_path, tmp_path / "out", 1, [], {})
    plans = sorted((ROOT / "benchmarks" / "races").glob("*.yaml"))
    for path in plans:
        for run in runs.read_plan(path).runs:
            assert trainer.result(run) is None  # its settings are valid
    assert plans
