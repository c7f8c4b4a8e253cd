"""The benchmarks start. What they measure is no test."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.py")))
def test_help(name, tmp_path):
    """From any folder; tokenize.py, named like a module of the standard library, is in nobody's way."""
    done = subprocess.run(
        [sys.executable, FOLDER / name, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert name in done.stdout


def test_the_tokenising_benchmark_runs(tmp_path):
    (tmp_path / "text.txt").write_text("\n--\n".join(f"Document {i} of many words." for i in range(400)))
    command = [sys.executable, FOLDER / "tokenize.py", tmp_path / "text.txt", "--separator", r"\n--\n", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--candidates", "tiktoken", "prepare"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "400 documents" in done.stdout
    assert "| prepare |" in done.stdout
