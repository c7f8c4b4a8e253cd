"""Who may import whom (CONTRIBUTING.md): read from the source, so that a lazy import counts too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STANDARD = set(sys.stdlib_module_names)
ALLOWED = {
    "common": {"filelock"},
    "modeling_gpt2repro": {"torch", "transformers"},
    "data": {
        *("data", "numpy", "torch", "tqdm", "tiktoken", "transformers", "gigatoken"),
        *("fsspec", "huggingface_hub", "pyarrow"),
    },
    "training": {
        *("training", "torch", "accelerate", "numpy", "safetensors", "jsonargparse", "matplotlib"),
        *("psutil", "tqdm", "deepspeed"),
    },
    "eval": {
        *("eval", "torch", "numpy", "tqdm", "transformers", "accelerate", "datasets", "evaluate", "huggingface_hub"),
        *("lm_eval", "matplotlib", "pyarrow"),
    },
    "hub": {
        *("hub", "modeling_gpt2repro", "eval", "training", "torch", "numpy", "transformers", "huggingface_hub"),
        *("safetensors", "yaml", "onnx_ir", "onnxruntime", "gguf", "gradio"),
    },
}
FILES = [path for room in ALLOWED for path in sorted((ROOT / room).rglob("*.py"))]


def imports(path):
    """(module, is_relative) of every import in the file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, 0
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_what_it_may(path):
    room = path.relative_to(ROOT).parts[0]
    for module, level in imports(path):
        if level:
            assert level == 1, f"{path}: 'from {'.' * level}{module}' leaves the folder"
            assert room == "modeling_gpt2repro" or path.parent.parent == ROOT / "eval", (
                f"{path}: relative imports are for files that are copied elsewhere"
            )
        else:
            top = module.split(".")[0]
            # The one exception: text and shards are read in one place only.
            more = {"data"} if path == ROOT / "eval" / "bits_per_byte" / "task.py" else set()
            if room != "modeling_gpt2repro":
                more.add("common")  # the bottom layer
            assert top in STANDARD | ALLOWED[room] | more, f"{path}: {room} may not import {module}"


def test_nothing_imports_train_or_sample():
    for path in FILES:
        assert not {"train", "sample"} & {module for module, _ in imports(path)}, path


def test_every_room_has_files():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(ALLOWED)


def test_training_starts_without_heavy_optional_packages():
    code = (
        "import sys, train, hub.push; "
        "heavy = {'datasets', 'evaluate', 'matplotlib', 'pandas', 'tensorboard', 'sklearn', 'gradio', 'onnx'}; "
        "heavy &= set(sys.modules); "
        "sys.exit(f'import train imported {sorted(heavy)}' if heavy else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
