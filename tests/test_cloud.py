"""Files for services that cannot be run here: they parse, and their commands have the options they show."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import yaml
from tiny_run import ROOT

from training.config import load_config

FILES = [*sorted(ROOT.glob(".github/**/*.yml")), ROOT / "CITATION.cff", ROOT / ".pre-commit-config.yaml"]


@pytest.mark.parametrize("path", [*FILES, ROOT / "cloud/skypilot.yaml"], ids=lambda path: path.name)
def test_yaml_is_a_mapping(path):
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def test_workflow_tests_the_pythons_and_systems_of_the_readme():
    jobs = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))["jobs"]
    assert jobs["tests"]["strategy"]["matrix"] == {
        "os": ["ubuntu-latest", "macos-latest", "windows-latest"],
        "python": ["3.11", "3.12", "3.13"],
    }


def test_skypilot_commands_have_settings_that_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    task = yaml.safe_load((ROOT / "cloud/skypilot.yaml").read_text(encoding="utf-8"))
    run = task["run"]
    for name, value in task["envs"].items():
        run = run.replace(f"${name}", value or "x")
    words = shlex.split(run.replace("\\\n", " "))
    assert (ROOT / words[words.index("--config_file") + 1]).is_file()
    load_config(words[words.index("train.py") + 1 :])


@pytest.mark.parametrize(
    ("code", "status", "is_public"),
    [(0, "finished", False), (1, "resume me", False), (1, "failed", True), (1, "finished", False)],
)
def test_hf_job_clones_installs_trains_and_pushes_what_train_did_not(code, status, is_public, tmp_path, monkeypatch):
    """Run it with a stand-in for each program that it starts. A finished run with code 1 could not be pushed."""
    log = tmp_path / "log"
    stand_in = f'#!{sys.executable}\nimport json, sys; open({str(log)!r}, "a").write(json.dumps(sys.argv) + "\\n")\n'
    names = ("pip", "accelerate", "python")
    for path in (tmp_path / "bin/git", *(tmp_path / f"gpt2-repro/.venv/bin/{name}" for name in names)):
        path.parent.mkdir(parents=True, exist_ok=True)
        ends = f"sys.exit({code})\n" if path.name == "accelerate" else ""
        path.write_text(stand_in + ends, encoding="utf-8")
        path.chmod(0o755)
    run = tmp_path / "gpt2-repro/runs/a"
    for step in ("000900", "001000"):
        (run / f"checkpoints/step_{step}").mkdir(parents=True)
    (run / "status.json").write_text(json.dumps({"status": status}))
    (run / "provenance.json").write_text(json.dumps({"config": {"push_public": is_public}}))
    (tmp_path / "gpt2-repro/venv.py").write_text("", encoding="utf-8")  # `python -m venv` does nothing here
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    options = ["--max_hours", "11", "--text", "a/b"]
    command = [sys.executable, ROOT / "cloud/hf_job.py", "https://example.org/x", "me/model", *options]
    assert subprocess.run(command, cwd=tmp_path).returncode == (code if status == "failed" else 0)
    git, pip, launch, *push = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    assert git[1:] == ["clone", "--depth", "1", "https://example.org/x", "gpt2-repro"]
    assert pip[1:] == ["install", "-q", "-c", "constraints.txt", "-e", "."]
    assert launch[1:3] == ["launch", "train.py"]
    assert load_config(launch[3:]).push_to_hub == "me/model"
    pushed = ["-m", "hub", "push", "runs/a/checkpoints/step_001000", "me/model"]
    pushed += ["--public"] * is_public
    assert [arguments[1:] for arguments in push] == [[*pushed, "--dry_run"], pushed] * code


def test_dockerfile_copies_what_it_installs():
    text = (ROOT / "cloud/Dockerfile").read_text(encoding="utf-8")
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    for name in re.findall(r"-c (\S+)", text):
        assert (ROOT / name).is_file() and name not in ignored
