"""Test HellaSwag's metric: values computed by hand, from Python and through `evaluate.load`."""

import ast
import math
import statistics
from pathlib import Path

import evaluate
import pytest

from eval.hellaswag.accuracy import accuracy

FOLDER = Path(__file__).parents[2] / "eval" / "hellaswag"


def prediction(log_likelihoods, lengths):
    return {"log_likelihoods": log_likelihoods, "lengths": lengths}


# Four items, correct by: the sum only, the mean only, both, neither.
PREDICTIONS = [
    prediction([-4.0, -9.0, -9.0, -6.0], [1, 3, 3, 3]),  # highest sum 0, means -4 -3 -3 -2: highest 3
    prediction([-4.0, -9.0, -9.0, -6.0], [1, 3, 3, 3]),
    prediction([-9.0, -5.0, -9.0, -9.0], [3, 3, 3, 3]),
    prediction([-9.0, -5.0, -9.0, -9.0], [3, 3, 3, 3]),
]
REFERENCES = [0, 3, 1, 2]
STDERR = math.sqrt(1 / 12)  # p = 1/2 of n = 4: sqrt(1/2 * 1/2 / 3)
EXPECTED = {"acc": 0.5, "acc_stderr": STDERR, "acc_norm": 0.5, "acc_norm_stderr": STDERR, "n": 4}


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    """Load the metric with a temporary folder for its copy instead of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path_factory.mktemp("metrics"))
        yield evaluate.load(str(FOLDER), keep_in_memory=True)


def test_accuracy_matches_values_computed_by_hand():
    assert accuracy(PREDICTIONS, REFERENCES) == pytest.approx(EXPECTED)
    by_item = [accuracy([p], [r]) for p, r in zip(PREDICTIONS, REFERENCES, strict=True)]
    assert [result["acc"] for result in by_item] == [1, 0, 1, 0]
    assert [result["acc_norm"] for result in by_item] == [0, 1, 1, 0]


def test_evaluate_library_gives_the_same_values_also_in_batches(metric):
    result = metric.compute(predictions=PREDICTIONS, references=REFERENCES)
    assert result == pytest.approx(EXPECTED)
    assert list(result) == list(EXPECTED)
    for start in (0, 2):
        metric.add_batch(predictions=PREDICTIONS[start : start + 2], references=REFERENCES[start : start + 2])
    assert metric.compute() == pytest.approx(EXPECTED)


def test_evaluate_load_works_offline_with_the_path_in_the_readme(run_python):
    """Run the documented example too."""
    example = """
import doctest, evaluate
hellaswag = evaluate.load("eval/hellaswag")
assert "zellers2019hellaswag" in hellaswag.citation
assert "log_likelihoods" in hellaswag.inputs_description
parsed = doctest.DocTestParser().get_doctest(hellaswag.inputs_description, {"evaluate": evaluate}, "", "", 0)
print(doctest.DocTestRunner().run(parsed))
"""
    run = run_python("-c", example, HF_HUB_OFFLINE="1")
    assert "failed=0, attempted=2" in run.stdout, run.stdout + run.stderr


@pytest.mark.parametrize("name", ["hellaswag.py", "accuracy.py"])
def test_files_that_evaluate_copies_import_nothing_from_this_project(name):
    """The rest of `eval` is not in the cache of `evaluate`."""
    for node in ast.walk(ast.parse((FOLDER / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name for alias in node.names} <= {"datasets", "evaluate", "inspect", "math", "numpy"}
        elif isinstance(node, ast.ImportFrom):
            assert (node.level, node.module) in {(1, "accuracy"), (0, "collections.abc"), (0, "typing")}


def test_standard_error_uses_the_sample_deviation():
    correct = [1, 0, 0, 1, 1, 0, 1]
    predictions = [prediction([-1.0, -2.0], [1, 1])] * len(correct)
    result = accuracy(predictions, [1 - is_correct for is_correct in correct])
    assert result["acc"] == statistics.mean(correct)
    assert result["acc_stderr"] == pytest.approx(statistics.stdev(correct) / math.sqrt(len(correct)))
    assert math.isnan(accuracy(PREDICTIONS[:1], [0])["acc_stderr"])


def test_first_of_equal_endings_is_chosen():
    tied = [prediction([-2.0, -1.0, -1.0], [2, 1, 1])]
    assert accuracy(tied, [1])["acc"] == 1.0
    assert accuracy(tied, [0])["acc_norm"] == 1.0  # all three means are -1


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "no predictions"),
        (PREDICTIONS, [0, 3], "4 predictions for 2 references"),
        ([PREDICTIONS[0], prediction([-1.0] * 3, [1] * 3)], [0, 0], "item 1: 3 endings, but item 0 has 4"),
        ([prediction([-1.0, -2.0], [1])], [0], "item 0: 2 log_likelihoods and 1 lengths"),
        ([prediction([-1.0], [1])], [0], "item 0: .* at least two endings"),
        ([PREDICTIONS[0], prediction([-1.0] * 4, [1, 0, 1, 1])], [0, 0], r"item 1: lengths .* got \[1, 0, 1, 1\]"),
        ([prediction([-1.0, math.nan], [1, 1])], [0], "item 0: log_likelihoods must be numbers"),
        ([PREDICTIONS[0]] * 2, [0, 4], "item 1: label must be between 0 and 3, got 4"),
        ([PREDICTIONS[0]], [-1], "item 0: label .* got -1"),
    ],
)
def test_malformed_item_is_named(metric, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        accuracy(predictions, references)
    if len(predictions) == len(references):  # evaluate checks that itself
        with pytest.raises(ValueError, match=message):
            metric.compute(predictions=predictions, references=references)
