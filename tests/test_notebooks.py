"""The notebooks: cells of the first one as a script, with a tiny run; all of them in a kernel, as they are (slow)."""

import json
import shutil

import pytest
from tiny_run import ROOT, clean_environment

from common.metrics import read_metrics

SETTINGS = 'SETTINGS = ["--output_dir", "runs/quickstart", "--resume", "auto"]'
JUPYTER = "from IPython.display import Image, display"


def code_of(name):
    cells = json.loads((ROOT / "notebooks" / name).read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_cells_of_the_quickstart_train_and_sample(launch, tiny, tmp_path):
    run = tmp_path / "run"
    code = "\n".join(code_of("quickstart.ipynb"))
    assert SETTINGS in code and JUPYTER in code
    code = code.replace(SETTINGS, f'SETTINGS = ["--output_dir", {str(run)!r}, "--config", {str(tiny)!r}]')
    code = code.replace(JUPYTER, 'Image, display = lambda path: open(path, "rb").read()[1:4], print')
    done = launch(code, script="-c")
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == 20
    assert "b'PNG'" in done.stdout  # the curves
    assert done.stdout.rstrip().count("Return a list of") == done.stdout.count("The with statement is used to") == 1


@pytest.mark.slow
def test_notebooks_run_from_top_to_bottom(tmp_path, monkeypatch):
    """As they are: the first one trains the sample recipe, the second one looks into its model."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    for name, value in clean_environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    copy = tmp_path / "clone"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "shards"))
    for name, num_pictures in (("quickstart.ipynb", 1), ("inside.ipynb", 3)):
        notebook = nbformat.read(copy / "notebooks" / name, as_version=4)
        nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": copy / "notebooks"}}).execute()
        outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
        assert sum("image/png" in output.get("data", {}) for output in outputs) == num_pictures
