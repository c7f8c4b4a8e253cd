"""CORE's tasks, and reading their items from the bundle that nanochat and DCLM publish, a folder or a .zip."""

import random
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from common.jsonl import COMPRESSIONS, json_lines
from eval import EvalError
from eval.items import check_fields

BUNDLE = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
# The fields of an item, by kind of task.
CHOICES, SCHEMA, COMPLETION = "choices", "schema", "completion"
_FIELDS = {
    CHOICES: ("query", "choices", "gold"),
    SCHEMA: ("context_options", "continuation", "gold"),
    COMPLETION: ("context", "continuation"),
}
_ANSWER = "\nAnswer: "


class CoreTask(NamedTuple):
    """One of CORE's tasks."""

    name: str
    folder: str
    """of its file in the bundle"""
    file: str
    """without .jsonl"""
    kind: str
    shots: int
    """examples before each item"""
    chance: float
    """accuracy of guessing"""
    size: int
    """items in the bundle"""
    delimiter: str = " "
    """between a question and its answer"""


# DCLM's eval/mmlu_and_lowvar.yaml (without MMLU) and eval/eval_meta_data.csv.
_REASONING, _KNOWLEDGE, _LANGUAGE = "commonsense_reasoning", "world_knowledge", "language_understanding"
_READING, _SYMBOLS = "reading_comprehension", "symbolic_problem_solving"
# fmt: off
CORE = [
    CoreTask("hellaswag_zeroshot", _LANGUAGE, "hellaswag", CHOICES, 0, 0.25, 10_042),
    CoreTask("jeopardy", _KNOWLEDGE, "jeopardy_all", COMPLETION, 10, 0.0, 2_117, _ANSWER),
    CoreTask("bigbench_qa_wikidata", _KNOWLEDGE, "bigbench_qa_wikidata", COMPLETION, 10, 0.0, 20_321),
    CoreTask("arc_easy", _KNOWLEDGE, "arc_easy", CHOICES, 10, 0.25, 2_376, _ANSWER),
    CoreTask("arc_challenge", _KNOWLEDGE, "arc_challenge", CHOICES, 10, 0.25, 1_172, _ANSWER),
    CoreTask("copa", _REASONING, "copa", CHOICES, 0, 0.5, 100),
    CoreTask("commonsense_qa", _REASONING, "commonsense_qa", CHOICES, 10, 0.2, 1_221),
    CoreTask("piqa", _REASONING, "piqa", CHOICES, 10, 0.5, 1_838, _ANSWER),
    CoreTask("openbook_qa", _REASONING, "openbook_qa", CHOICES, 0, 0.25, 500),
    CoreTask("lambada_openai", _LANGUAGE, "lambada_openai", COMPLETION, 0, 0.0, 5_153),
    CoreTask("hellaswag", _LANGUAGE, "hellaswag", CHOICES, 10, 0.25, 10_042),
    CoreTask("winograd", _LANGUAGE, "winograd_wsc", SCHEMA, 0, 0.5, 273),
    CoreTask("winogrande", _LANGUAGE, "winogrande", SCHEMA, 0, 0.5, 1_267),
    CoreTask("bigbench_dyck_languages", _SYMBOLS, "bigbench_dyck_languages", COMPLETION, 10, 0.0, 1_000),
    CoreTask("agi_eval_lsat_ar", _SYMBOLS, "agi_eval_lsat_ar", CHOICES, 3, 0.2, 230),
    CoreTask("bigbench_cs_algorithms", _SYMBOLS, "bigbench_cs_algorithms", COMPLETION, 10, 0.0, 1_320),
    CoreTask("bigbench_operators", _SYMBOLS, "bigbench_operators", COMPLETION, 10, 0.0, 210),
    CoreTask("bigbench_repeat_copy_logic", _SYMBOLS, "bigbench_repeat_copy_logic", COMPLETION, 10, 0.0, 32),
    CoreTask("squad", _READING, "squad", COMPLETION, 10, 0.0, 10_570),
    CoreTask("coqa", _READING, "coqa", COMPLETION, 0, 0.0, 7_983),
    CoreTask("boolq", _READING, "boolq", CHOICES, 10, 0.62, 3_270, _ANSWER),
    CoreTask("bigbench_language_identification", _LANGUAGE, "bigbench_language_identification", CHOICES, 10, 0.091,
             10_000),
]
# fmt: on


def read_bundle(path: str) -> Iterator[tuple[CoreTask, list[dict[str, Any]]]]:
    """Yield each of CORE's tasks that is there, with its items in the order in which they are scored.

    Args:
        path: the bundle, a folder or a .zip; or a folder with some of its .jsonl files (also .gz, .xz, .zst).

    Raises:
        UserError: none of CORE's files is there, or an item is malformed.
    """
    folder = Path(path)
    if zipfile.is_zipfile(folder):
        with tempfile.TemporaryDirectory() as unpacked:
            try:
                with zipfile.ZipFile(folder) as archive:
                    names = [name for name in archive.namelist() if PurePosixPath(name).suffix == ".jsonl"]
                    archive.extractall(unpacked, names)
            except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
                raise EvalError(
                    f"--data core={path}: damaged or encrypted ({error}); get it again, {BUNDLE}"
                ) from error
            yield from read_bundle(unpacked)
        return
    if not folder.is_dir():
        raise EvalError(f"--data core={path}: no such folder or .zip; get the bundle, {BUNDLE}")
    found = False
    for task in CORE:
        file = _find_file(folder, task)
        if file is not None:
            found = True
            yield task, _read_items(file, task)
    if not found:
        raise EvalError(f"--data core={path}: none of CORE's files is there (arc_easy.jsonl, ...); get {BUNDLE}")


def _find_file(folder: Path, task: CoreTask) -> Path | None:
    """Return a task's file: in its folder of the bundle, or next to the others in one folder."""
    for suffix in ("", *COMPRESSIONS):
        name = f"{task.file}.jsonl{suffix}"
        for path in (*folder.rglob(f"{task.folder}/{name}"), folder / name):
            if path.is_file():
                return path
    return None


def _read_items(path: Path, task: CoreTask) -> list[dict[str, Any]]:
    """Return the items shuffled by 1337, as nanochat does, so that the first N are a sample."""
    items = []
    for where, item in json_lines(path):
        check_fields(item, _FIELDS[task.kind], where)
        options = item.get("choices", item.get("context_options", []))
        if not isinstance(options, list):
            raise EvalError(f"{where}: the answers must be a list, got {options!r}")
        if task.kind != COMPLETION and item["gold"] not in range(len(options)):
            raise EvalError(f"{where}: gold must be between 0 and {len(options) - 1}, got {item['gold']!r}")
        texts = [item.get(field, "") for field in ("query", "context", "continuation")]
        if not all(isinstance(text, str) for text in [*options, *texts]):
            raise EvalError(f"{where}: query, context, continuation and answers must be text")
        items.append(item)
    if len(items) <= task.shots:
        raise EvalError(f"{path}: {len(items)} items; each is preceded by {task.shots} others, so give more")
    random.Random(1337).shuffle(items)
    return items
