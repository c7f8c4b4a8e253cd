"""Run transformers' own tests of a model on ours and on transformers' GPT-2, and print where they differ.

    python -m benchmarks.hf_suite                      # all tests, some minutes on a CPU
    python -m benchmarks.hf_suite -k "resize or save"  # pytest's -k

The tests are the mixins of the source distribution of the installed transformers version (ModelTesterMixin,
TrainingTesterMixin, FSDPTesterMixin, TensorParallelTesterMixin and ConfigTester). They are downloaded into a temporary
folder and are not part of this repository. The source distribution lacks some files that they import; small stand-ins
replace these. Two mixins are among them, GenerationTesterMixin and ExportTesterMixin: tests/modeling has tests of our
own of generation and export against transformers' GPT-2.

Prints a table of the tests with different outcomes and the counts. Exit code 1 if ours fails a test that stock passes.
"""

import collections
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

from benchmarks.harness import make_parser
from common.markdown import table

ROOT = Path(__file__).resolve().parents[1]
Outcomes = dict[str, dict[str, tuple[str, str]]]

# Files that the source distribution's tests import and does not have.
STAND_INS = {
    "exporters/test_export.py": "class ExportTesterMixin: pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin: pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "distributed_testing_utils.py": """
import torch

def _get_distributed_backend(): return "gloo"
def _get_distributed_device_type(): return "cpu"
def _get_rank_device(rank): return torch.device("cpu")
def _set_rank_device(rank): torch.set_num_threads(1)
def _start_rank_processes(function, args, nprocs): torch.multiprocessing.spawn(function, args, nprocs)
def run_distributed(world_size): raise NotImplementedError("tensor parallelism, which needs a plan: GPT-2 has none")
""",
}
TEST_FILE = """
import unittest

import transformers

import modeling_gpt2repro
from modeling_gpt2repro.modeling_gpt2repro import GPT2ReproBlock

from .generation.test_utils import GenerationTesterMixin
from .test_configuration_common import ConfigTester
from . import test_fsdp_mixin
from .test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask
from .test_tensor_parallel_mixin import TensorParallelTesterMixin
from .test_training_mixin import TrainingTesterMixin

test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None  # the list of models that the mixin is restricted to
# Ours selects hidden states without transformers' hooks; the test of it asks for their table.
modeling_gpt2repro.GPT2ReproPreTrainedModel._can_record_outputs = {"hidden_states": GPT2ReproBlock}


class Tester:
    batch_size, seq_length, is_training = 13, 7, True
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads = 99, 32, 2, 4

    def __init__(self, config_class, classes):
        self.config_class = config_class
        self.base_model_class, self.causal_lm_class, self.sequence_classification_class, _ = classes

    def get_config(self):
        return self.config_class(
            vocab_size=self.vocab_size, n_embd=self.hidden_size, n_layer=self.num_hidden_layers,
            n_head=self.num_attention_heads, n_inner=37, n_positions=512,
            bos_token_id=1, eos_token_id=98, pad_token_id=98,
        )

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        inputs = {"input_ids": ids_tensor(shape, self.vocab_size), "attention_mask": random_attention_mask(shape)}
        return self.get_config(), inputs


class Tests(GenerationTesterMixin, ModelTesterMixin, TrainingTesterMixin, test_fsdp_mixin.FSDPTesterMixin,
            TensorParallelTesterMixin):
    model_tester = None

    def setUp(self):
        self.model_tester = Tester(self.config_class, self.all_model_classes)

    def test_config(self):
        ConfigTester(self, self.config_class, n_embd=32, n_head=4).run_common_tests()


class TestStock(Tests, unittest.TestCase):
    config_class = transformers.GPT2Config
    all_model_classes = (
        transformers.GPT2Model,
        transformers.GPT2LMHeadModel,
        transformers.GPT2ForSequenceClassification,
        transformers.GPT2ForTokenClassification,
    )


class TestOurs(Tests, unittest.TestCase):
    config_class = modeling_gpt2repro.GPT2ReproConfig
    all_model_classes = (
        modeling_gpt2repro.GPT2ReproModel,
        modeling_gpt2repro.GPT2ReproForCausalLM,
        modeling_gpt2repro.GPT2ReproForSequenceClassification,
        modeling_gpt2repro.GPT2ReproForTokenClassification,
    )
"""


def fetch_tests(folder: Path, version: str) -> Path:
    """Download the tests of transformers `version` into `folder`, with `parameterized`, which they need."""
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "install", "--target", str(folder / "packages"), "parameterized"], check=True)
    only_source = ["--no-deps", "--no-binary", "transformers", "--no-build-isolation"]
    download = [*pip, "download", *only_source, "--dest", str(folder), f"transformers=={version}"]
    subprocess.run(download, check=True)
    with tarfile.open(folder / f"transformers-{version}.tar.gz") as archive:
        prefix = f"transformers-{version}/tests/"
        members = [member for member in archive.getmembers() if member.name.startswith(prefix)]
        archive.extractall(folder, members, filter="data")
    return folder / f"transformers-{version}" / "tests"


def run_tests(folder: Path, version: str, expression: str) -> Outcomes:
    """Run the tests that the pytest expression selects. Return {"TestStock": outcomes, "TestOurs": outcomes}."""
    tests = fetch_tests(folder, version)
    for path, text in STAND_INS.items():
        (tests / path).parent.mkdir(exist_ok=True)
        (tests / path).write_text(text)
    (tests / "test_pair.py").write_text(TEST_FILE)
    for package in (tests, *(path for path in tests.iterdir() if path.is_dir())):
        (package / "__init__.py").touch()
    report = folder / "report.xml"
    options = ["-q", "-p", "no:cacheprovider", "--tb=short", f"--junitxml={report}", "-k", expression]
    environment = os.environ | {"PYTHONPATH": f"{folder / 'packages'}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", *options, "tests/test_pair.py"]
    done = subprocess.run(command, cwd=tests.parent, env=environment, capture_output=True, text=True)
    if not report.exists() or done.returncode not in (0, 1):
        sys.exit(f"{done.stdout[-4000:]}{done.stderr[-4000:]}\npytest ended with exit code {done.returncode}")
    return read_report(report)


def read_report(report: Path) -> Outcomes:
    """Read {"TestStock" or "TestOurs": {test: (outcome, reason)}} from a JUnit file."""
    outcomes: Outcomes = {"TestStock": {}, "TestOurs": {}}
    for case in ET.parse(report).iter("testcase"):
        outcome, reason = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = {"failure": "FAILED", "error": "ERROR", "skipped": "skipped"}[child.tag]
                reason = (child.get("message") or "").strip().partition("\n")[0]
        class_name = case.attrib["classname"].rpartition(".")[2]
        outcomes.setdefault(class_name, {})[case.attrib["name"]] = outcome, reason
    return outcomes


def main() -> None:
    """Run the tests and print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("-k", default="", help="run the tests that this pytest expression selects")
    args = parser.parse_args()
    version = importlib.metadata.version("transformers")
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run_tests(Path(folder), version, args.k)
    stock, ours = outcomes["TestStock"], outcomes["TestOurs"]
    missing = ("not run", "")
    rows, num_worse = [], 0
    for test in sorted(stock.keys() | ours.keys()):
        (stock_outcome, stock_reason), (our_outcome, our_reason) = stock.get(test, missing), ours.get(test, missing)
        num_worse += stock_outcome == "passed" and our_outcome in ("FAILED", "ERROR")
        if stock_outcome != our_outcome or "FAILED" in (stock_outcome, our_outcome):
            rows.append([test, stock_outcome, our_outcome, (our_reason or stock_reason)[:200]])
    print(f"transformers {version}\n\n{table(('test', 'stock', 'ours', 'reason'), rows)}")
    for label, tests in (("stock", stock), ("ours", ours)):
        counts = collections.Counter(outcome for outcome, _ in tests.values())
        print(f"\n{label}: {', '.join(f'{number} {outcome}' for outcome, number in sorted(counts.items()))}")
    print(f"\n{num_worse} that stock passes and ours fails")
    sys.exit(num_worse > 0)


if __name__ == "__main__":
    main()
