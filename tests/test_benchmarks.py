"""The benchmarks start. What they measure is no test."""

import functools
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"

# What `python benchmarks/x.py --help` does, for each: the packages they share are imported once.
HELP = """
import runpy, sys
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    sys.path.insert(0, path.rpartition("/")[0])
    sys.modules.pop("tokenize", None)  # the standard library's, which whoever wants it must still find
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as exit:
        assert not exit.code, path
    else:
        raise AssertionError(path)
    import tokenize
    assert "benchmarks" not in tokenize.__file__, path
"""


def test_help(tmp_path):
    """From any folder; tokenize.py, named like a module of the standard library, is in nobody's way."""
    paths = sorted(FOLDER.glob("*.py"))
    done = subprocess.run(
        [sys.executable, "-c", HELP, *paths], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for path in paths:
        assert f"usage: {path.name}" in done.stdout


def test_the_tokenising_benchmark_runs(tmp_path):
    (tmp_path / "text.txt").write_text("\n--\n".join(f"Document {i} of many words." for i in range(400)))
    command = [sys.executable, FOLDER / "tokenize.py", tmp_path / "text.txt", "--separator", r"\n--\n", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--candidates", "tiktoken", "prepare"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "400 documents" in done.stdout
    assert "| prepare |" in done.stdout


def test_a_race_says_how_many_tokens_and_seconds_another_recipe_needs(tmp_path, monkeypatch, capsys):
    """
    Made-up ones: the reference, one that needs half the tokens and 0.6 of the time, one that never gets there, one that
    gets there and comes back up, one that gets there and has no finite loss, one that gets there and gives up.
    """
    race = runpy.run_path(str(FOLDER / "race.py"))
    recipe = tmp_path / "x.yaml"
    recipe.write_text("max_steps: 8\n")
    asked = []

    def train(folder, settings, seed, launch, max_skipped_steps):
        asked.append((folder.name, settings, seed))
        folder.mkdir(parents=True)
        slope, ms = {"slow": (0.5, 1000), "adamw": (1.0, 1000)}.get(folder.parent.name, (2.0, 1200))
        records = [{"step": 0, "tokens": 0, "val_loss": 10.0}]
        for step in range(1, 9):
            records.append({"step": step, "tokens": 100 * step, "loss": 1.0, "ms": ms})
            if step % 2 == 0:
                records.append(
                    {"step": step, "tokens": 100 * step, "val_loss": 10 - slope * step / 2 - 0.01 * int(folder.name)}
                )
        if folder.parent.name in ("rising", "diverging"):
            records[-1]["val_loss"] = 9.0 if folder.parent.name == "rising" else None
        made = {"hardware": dict.fromkeys(("processes", "device", "cpu_count", "mixed_precision")), "code": None}
        made["versions"] = {"torch": f"2.{min(len(asked) - 1, 1)}"}
        (folder / "provenance.json").write_text(json.dumps(made))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

        return folder.parent.name != "failing"

    monkeypatch.setitem(race["main"].__globals__, "train", train)
    others = [f"{name}={recipe}" for name in ("slow", "rising", "diverging", "failing")]
    runners = [f"adamw={recipe}", f"fast={recipe},optim.muon_lr=0.02,optim.betas=[0.9, 0.99],seed=5", *others]
    monkeypatch.setattr(sys, "argv", ["race.py", *runners, "--seeds", "1", "2", "--out", str(tmp_path / "out")])
    race["main"]()
    settings = ["--config", str(recipe), "--optim.muon_lr", "0.02", "--optim.betas", "[0.9, 0.99]", "--seed", "5"]
    assert asked[1] == ("1", settings, 1)
    reference, fast, slow, rising, diverging, failing = json.loads((tmp_path / "out" / "race.json").read_text())["rows"]
    assert reference["loss"] == pytest.approx([5.99, 5.98]) and reference["token_ratio"] == [1.0, 1.0]
    assert fast["token_ratio"] == pytest.approx([0.5, 0.5])
    assert fast["time_ratio"] == pytest.approx([0.6, 0.6])
    assert slow["token_ratio"] == rising["token_ratio"] == [None, None]
    for row in (diverging, failing):  # it was there, and did not stay
        assert row["loss"] == row["token_ratio"] == [None, None]
    said = capsys.readouterr().out
    assert "not of one machine" in said and "torch 2.0" in said and "torch 2.1" in said
    assert "| fast | 2 | 800 | 1.9850 ± 0.0071 | -4.0000 ± 0.0000 | 0.50 ± 0.00 | 0.60 ± 0.00 |" in said
    assert f"| failing | 2 | 800 {'| not reached by 2 of 2 ' * 4}|" in said
    assert (tmp_path / "out" / "race.png").stat().st_size > 10_000


def test_a_race_does_not_take_a_run_of_other_settings_for_its_own(tmp_path, finished_run, tiny):
    race = runpy.run_path(str(FOLDER / "race.py"))
    folder, _ = finished_run
    settings = ["--config", str(tiny), "--trackers", "[tensorboard]"]
    race["check"](folder, settings, 1337)
    with pytest.raises(SystemExit, match=r"other settings \(optim\)"):
        race["check"](folder, [*settings, "--optim.lr", "1e-4"], 1337)
    with pytest.raises(SystemExit, match=r"unknown setting 'optim\.learning_rate'"):
        race["check"](tmp_path / "new", [*settings, "--optim.learning_rate", "1"], 1337)
    assert race["train"](folder, settings, 1337, "", 10)  # it is finished: nothing is run
    configs = [race["check"](tmp_path / "new", [*settings, *more], 1) for more in ([], ["--model.n_layer", "3"])]
    with pytest.raises(SystemExit, match="differ in model"):
        race["check_comparable"](configs)
    race["check_comparable"](configs[:1] * 2)


def test_a_race_ends_with_a_run_that_fails_for_another_reason_than_diverging(tmp_path, monkeypatch):
    race = runpy.run_path(str(FOLDER / "race.py"))
    folder = tmp_path / "x" / "1"
    folder.mkdir(parents=True)
    (folder / "status.json").write_text('{"status": "failed"}')  # an earlier attempt's
    records = [{"step": 1, "tokens": 8, "loss": 3.0}]
    records += [{"step": n + 1, "tokens": 8, "loss": None, "skipped": {"in_a_row": n}} for n in (1, 2)]
    runs = []

    def run(*arguments, writes, **more):
        runs.append(writes)
        if writes:
            (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records[:writes]))
            (folder / "status.json").write_text('{"status": "failed"}')

    for writes in (0, 1, 2):  # it does not begin; it fails; it fails after a skipped step
        monkeypatch.setattr(subprocess, "run", functools.partial(run, writes=writes))
        with pytest.raises(SystemExit, match=r"did not come to its end: see console\.log"):
            race["train"](folder, [], 1, "", 2)
    monkeypatch.setattr(subprocess, "run", functools.partial(run, writes=3))
    for _ in range(2):
        assert not race["train"](folder, [], 1, "", 2)
    assert runs == [0, 1, 2, 3]  # what has diverged would do so again
