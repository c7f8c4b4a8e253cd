"""The notebooks: cells as scripts, with a tiny run; all of them in a kernel, as they are (slow)."""

import importlib.util
import json
import shutil

import pytest
from tiny_run import ROOT, clean_environment

from common.metrics import read_metrics
from data.tokenizer import GPT2

SETTINGS = 'SETTINGS = ["--output_dir", "runs/quickstart", "--resume", "auto"]'
JUPYTER = "from IPython.display import Image, display"


def code_of(name):
    cells = json.loads((ROOT / "notebooks" / name).read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_cells_of_the_quickstart_train_and_sample(launch, tiny, tmp_path):
    run = tmp_path / "run"
    code = "\n".join(code_of("quickstart.ipynb"))
    assert SETTINGS in code and JUPYTER in code
    # A context for its 40 new tokens: an untrained model seldom ends a text before.
    settings = ["--output_dir", str(run), "--config", str(tiny), "--model.n_positions", "64"]
    code = code.replace(SETTINGS, f"SETTINGS = {settings}")
    code = code.replace(JUPYTER, 'Image, display = lambda path: open(path, "rb").read()[1:4], print')
    done = launch(code, script="-c")
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == 20
    assert "b'PNG'" in done.stdout  # the curves
    assert done.stdout.rstrip().count("Return a list of") == done.stdout.count("The with statement is used to") == 1


def test_conversations_fit_the_template_of_the_chat_notebook():
    """The answers and their ends are learned, nothing else; and no conversation is cut at 128 tokens."""
    (cell,) = (cell for cell in code_of("chat.ipynb") if cell.startswith("tokenizer.chat_template"))
    tokenizer = GPT2.hf(model_max_length=128)
    exec(cell, {"tokenizer": tokenizer, "print": lambda *_: None})
    lines = (ROOT / "notebooks" / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len({*lines}) >= 60
    for line in lines:
        messages = json.loads(line)["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(message["content"].strip() == message["content"] != "" for message in messages)
        encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        learned = tokenizer.decode([token for token, is_learned in zip(ids, mask, strict=True) if is_learned])
        assert learned == "".join(message["content"] + "<|endoftext|>" for message in messages[1::2])
        assert len(ids) <= 128
        question = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        assert question == ids[: len(question)]  # the prompt of a chat is the beginning of what was learned


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    copy = tmp_path_factory.mktemp("notebooks") / "clone"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "shards"))
    return copy


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_pictures", "packages"),
    [("quickstart", 1, ()), ("inside", 3, ()), ("finetune", 1, ("peft",)), ("chat", 1, ("trl",))],
)
def test_notebook_runs_from_top_to_bottom(clone, tmp_path, monkeypatch, name, num_pictures, packages):
    """As it is: the first one trains the sample recipe, the others use its model."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    for variable, value in clean_environment(tmp_path).items():
        monkeypatch.setenv(variable, value)
    notebook = nbformat.read(clone / "notebooks" / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": clone / "notebooks"}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == num_pictures
