"""Test which room imports which (CONTRIBUTING.md), lazy imports included, and that setup.cfg declares all packages."""

import ast
import configparser
import itertools
import re
import subprocess
import sys

import pytest
from tiny_run import ROOT

STANDARD = set(sys.stdlib_module_names)
# Each room imports itself, the rooms listed here, and the model.
LOWER_ROOMS = {
    "common": set(),
    "data": {"common"},
    "eval": {"common", "data"},
    "hub": {"common", "data", "eval"},
    "training": {"common"},
}
MODEL = ROOT / "modeling_gpt2repro"
FILES = {room: sorted((ROOT / room).rglob("*.py")) for room in LOWER_ROOMS}
PRODUCT = [*MODEL.glob("*.py"), *itertools.chain(*FILES.values()), ROOT / "train.py", ROOT / "sample.py"]


def imports(path):
    """Yield (module, relative level) for every import in the file, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, 0
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


@pytest.mark.parametrize(("room", "lower_rooms"), LOWER_ROOMS.items())
def test_a_room_imports_only_lower_rooms(room, lower_rooms):
    names = {module.split(".")[0] for path in FILES[room] for module, level in imports(path) if not level}
    assert names & {*LOWER_ROOMS, "train", "sample"} - {room} <= lower_rooms


def test_modeling_files_import_only_each_other_and_torch_and_transformers():
    for path in MODEL.glob("*.py"):
        for module, level in imports(path):
            allowed = STANDARD | {"torch", "transformers"}
            assert level == 1 or (level == 0 and module.split(".")[0] in allowed), f"{path.name} imports {module}"


def test_training_starts_without_heavy_optional_packages():
    """And scoring, which training imports, without transformers and the packages of the Hub."""
    code = (
        "import sys, eval.published, eval.scoring, eval.hellaswag.task; "
        "light = {'transformers', 'datasets', 'evaluate', 'huggingface_hub'} & set(sys.modules); "
        "import train, hub.push; "
        "heavy = {'datasets', 'evaluate', 'matplotlib', 'pandas', 'tensorboard', 'sklearn', 'gradio', 'onnx'}; "
        "heavy &= set(sys.modules); "
        "sys.exit(f'scoring imported {sorted(light)}, train {sorted(heavy)}' if light | heavy else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


# ---------------------------------------------------------------------------------------------------------------
# setup.cfg declares what is imported, and nothing else.

# Packages whose name is not the name of their module.
DISTRIBUTIONS = {"yaml": "pyyaml"}
# Packages that are declared for others to import, with their users.
THROUGH_OTHERS = {
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


OTHER_FILES = sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
PRODUCT_EXTRAS = ("fast", "lm_eval", "onnx", "gguf", "demo", "cluster")
SKIPPED_WITHOUT = ("cluster", "notebooks")  # tests of these skip where they are not installed


def test_imports_are_declared():
    assert imported(PRODUCT) <= declared("install_requires", *PRODUCT_EXTRAS)
    assert imported(OTHER_FILES) <= declared("install_requires", "test", *SKIPPED_WITHOUT)


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
    assert {*PRODUCT_EXTRAS, *SKIPPED_WITHOUT, "test", "dev"} == extras()


def test_constraints_pin_what_is_declared():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines if not line.startswith("#")}
    assert declared("install_requires", "dev") <= pinned
