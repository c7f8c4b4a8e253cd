"""Who may import whom (CONTRIBUTING.md): read from the source, so that a lazy import counts too."""

import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STANDARD = set(sys.stdlib_module_names)
ALLOWED = {
    "common": {"common", "filelock"},
    "modeling_gpt2repro": {"torch", "transformers"},
    "data": {
        *("data", "numpy", "torch", "tqdm", "tiktoken", "transformers", "gigatoken"),
        *("fsspec", "huggingface_hub", "pyarrow"),
    },
    "training": {
        *("training", "torch", "accelerate", "numpy", "safetensors", "jsonargparse", "yaml", "matplotlib"),
        *("psutil", "tqdm"),
    },
    "eval": {
        *("eval", "torch", "numpy", "tqdm", "transformers", "accelerate", "datasets", "evaluate", "huggingface_hub"),
        *("lm_eval", "matplotlib", "pyarrow"),
    },
    "hub": {
        *("hub", "modeling_gpt2repro", "eval", "torch", "numpy", "transformers", "huggingface_hub"),
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
            if room not in ("common", "modeling_gpt2repro"):
                more |= {"common", "modeling_gpt2repro"}  # what everyone may import
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


# ---------------------------------------------------------------------------------------------------------------
# setup.cfg declares what is imported, and nothing else.

# Packages whose name is not the name of their module.
DISTRIBUTIONS = {"yaml": "pyyaml"}
# Packages that are declared for others to import, with their users.
THROUGH_OTHERS = {
    "jinja2": "huggingface_hub, for the template of the model card",
    "tensorboard": "torch.utils.tensorboard, through accelerate's tracker",
    "onnx": "torch.onnx",
    "onnxscript": "torch.onnx",
    "bitsandbytes": "transformers, for models in 8 and 4 bits",
    "transformers": "transformers[serving], its own server",
    "pytest-xdist": "pytest -n",
    "mypy": "a command",
    "ruff": "a command",
}


def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def extras():
    return {*setup_cfg()["options.extras_require"]}


def declared(*names):
    """Return the distributions that extras or `install_requires` name, normalized as pip does."""
    parser = setup_cfg()
    lines = []
    for name in names:
        section = "options" if name == "install_requires" else "options.extras_require"
        lines += parser[section][name].split("\n")
    found = {re.match(r"[\w.-]+", line)[0] for line in lines if line}
    return {re.sub(r"[-_.]+", "-", name).lower() for name in found}


def imported(paths):
    """Return the distributions whose modules the files import, lazily or not, or ask for by `importorskip`."""
    ours = {path.stem for path in ROOT.iterdir()} | {path.stem for path in (ROOT / "tests").rglob("*.py")}
    ours |= {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    modules = set()
    for path in paths:
        modules |= {module.split(".")[0] for module, level in imports(path) if not level}
        modules |= set(re.findall(r"importorskip\(\"(\w+)", path.read_text(encoding="utf-8")))
    return {DISTRIBUTIONS.get(name, name.lower().replace("_", "-")) for name in modules - STANDARD - ours}


PRODUCT = [*FILES, ROOT / "train.py", ROOT / "sample.py"]
OTHER_FILES = sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
PRODUCT_EXTRAS = ("fast", "lm_eval", "onnx", "gguf", "demo")


def test_imports_are_declared():
    assert imported(PRODUCT) <= declared("install_requires", *PRODUCT_EXTRAS)
    assert imported(OTHER_FILES) <= declared("install_requires", "test")


def test_packages_of_extras_are_imported_lazily():
    """Packages of an extra are imported in functions, never at the top of a file."""
    top = set()
    for path in PRODUCT:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            top |= {name.split(".")[0] for name in names}
    optional = declared(*PRODUCT_EXTRAS) - declared("install_requires")
    assert not {DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in top} & optional


def test_declared_packages_are_imported():
    assert declared("install_requires", *PRODUCT_EXTRAS) - {*THROUGH_OTHERS} <= imported(PRODUCT)
    assert declared("test", "dev") - {*THROUGH_OTHERS} <= imported(PRODUCT + OTHER_FILES)
    assert {*PRODUCT_EXTRAS, "test", "dev"} == extras()


def test_constraints_pin_what_is_declared():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines if not line.startswith("#")}
    assert declared("install_requires", "dev") <= pinned
