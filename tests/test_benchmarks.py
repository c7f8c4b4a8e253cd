"""The benchmarks start. What they measure is no test."""

import subprocess
import sys
from pathlib import Path

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
