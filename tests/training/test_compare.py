"""python -m training.compare on run folders written here."""

import json

import pytest

from training.compare import main


@pytest.fixture
def make_run(tmp_path):
    def make(name, losses, *, seed=1, lr=1e-3, parameters=1000, data="x"):
        folder = tmp_path / name
        folder.mkdir()
        config = {"seed": seed, "output_dir": str(folder), "optim": {"lr": lr}}
        provenance = {"config": config, "model": {"parameters": parameters}, "data": {"train_sha256": data}}
        (folder / "provenance.json").write_text(json.dumps(provenance))
        records = []
        for step, loss in enumerate(losses):
            if step:
                records.append({"step": step, "tokens": 100 * step, "loss": 3.0, "ms": 3.6e5, "tokens_per_s": 50})
            records.append({"step": step, "tokens": 100 * step, "val_loss": loss, "hellaswag": None})
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
        return folder

    return make


def test_runs_that_differ_only_in_the_seed_are_a_group(make_run, tmp_path, capsys):
    make_run("adamw_1", [9.0, 5.0, 4.0], seed=1)
    make_run("adamw_2", [9.0, 5.2, 4.2], seed=2)
    make_run("fast", [9.0, 4.0], lr=2e-3)
    picture = tmp_path / "out.png"
    assert main([str(tmp_path / "adamw_*"), str(tmp_path / "fast"), "--out", str(picture)]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("| run | seeds | parameters | tokens | val loss |")
    assert rows[0] == "| fast | 1 | 1,000 | 100 | 4.0000 | - | 0.10 | 50 |"
    assert rows[1] == "| adamw_1 to adamw_2 | 2 | 1,000 | 200 | 4.1000 ± 0.1414 | - | 0.20 | 50 |"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_losses_on_different_data_are_not_compared_in_silence(make_run, tmp_path, capsys):
    for name, data in (("a", "x"), ("b", "x"), ("c", "y")):
        make_run(name, [9.0, 5.0], data=data)
    for names, is_warned in (("ab", False), ("abc", True)):
        assert main([*(str(tmp_path / name) for name in names), "--out", str(tmp_path / "new" / "out.png")]) == 0
        assert ("different data" in capsys.readouterr().out) == is_warned


def test_what_is_not_a_run_is_an_error(make_run, tmp_path, capsys):
    assert main([str(tmp_path / "nothing*")]) == 2
    assert "no run there" in capsys.readouterr().err
    (make_run("new", []) / "metrics.jsonl").write_text("")
    assert main([str(tmp_path / "new")]) == 2
    assert "no step has been evaluated yet" in capsys.readouterr().err
    (tmp_path / "new" / "provenance.json").unlink()
    assert main([str(tmp_path / "new")]) == 2
    assert "provenance.json cannot be read" in capsys.readouterr().err


def test_a_diverged_run_comes_last_and_has_no_loss(make_run, tmp_path, capsys):
    make_run("diverged", [9.0, 3.0, None])
    make_run("fine", [9.0, 4.0], lr=2e-3)
    assert main([str(tmp_path / "*"), "--out", str(tmp_path / "out.png")]) == 0
    fine, diverged = capsys.readouterr().out.splitlines()[2:4]
    assert fine.startswith("| fine | 1 | 1,000 | 100 | 4.0000 |")
    assert diverged.startswith("| diverged | 1 | 1,000 | 200 | not finite |")


def test_names_with_brackets_and_pictures_that_cannot_be_written(make_run, tmp_path, capsys):
    run = make_run("x[1]", [9.0, 3.0])
    assert main([str(run), "--out", str(run)]) == 2
    assert f"--out {str(run)!r} cannot be written" in capsys.readouterr().err
