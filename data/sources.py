"""Where documents come from. A source is an iterator of str, one document each, in a fixed order."""

import ast
import inspect
import json
import sysconfig
from pathlib import Path

from data import DataError

# Test suites, bundled third-party code and an editor: hardly any prose, and not on every installation.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "ensurepip"}
# A module with less than a paragraph of documentation is no document.
_MIN_DOCSTRING_CHARACTERS = 200
_MIN_SAMPLE_CHARACTERS = 1_000_000


def sample_documents():
    """
    English prose that every Python carries: the language reference (pydoc_data.topics, a document a topic) and
    the standard library's docstrings (a document a source file). About 2 million characters, which differ a
    little between Python versions.

    Raises:
        DataError: this Python was stripped of them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it separately
        topics = {}

    documents = [topics[name] for name in sorted(topics)]
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(library).parts):
            text = docstrings(path)
            if len(text) >= _MIN_DOCSTRING_CHARACTERS:
                documents.append(text)
    characters = sum(len(text) for text in documents)
    if characters < _MIN_SAMPLE_CHARACTERS:
        raise DataError(
            f"this Python's documentation has only {characters:,} characters ({library}): it was installed without "
            "it. Use text of your own: `python -m data.prepare files PATH --out DIR`"
        )
    yield from documents


def docstrings(path):
    """The docstrings of a Python source file, in order, joined by blank lines; "" if it does not parse."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # some files of the standard library are broken on purpose
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))  # ast.walk goes level by level
    found = (ast.get_docstring(node, clean=False) for node in nodes)
    return "\n\n".join(inspect.cleandoc(text) for text in found if text)


def file_documents(paths, *, text_key="text", separator=None):
    """
    Documents of .txt and .jsonl files.

    Args:
        paths: files, or folders that are searched for such files, in the order given (a folder's by name).
        text_key: where the text stands in a .jsonl record; a record may also be a bare string.
        separator: what stands between documents of a .txt file; without one, a file is a document.

    Raises:
        DataError: a path that is not there or cannot be read, a file of another kind, a folder without any, text
            that is not UTF-8, a record without text, an empty separator; the message names file and line.
    """
    if separator == "":
        raise DataError("the separator is empty; leave it out where a file is one document")
    for path in _text_files(paths):
        try:
            if path.suffix == ".jsonl":
                yield from _jsonl_documents(path, text_key)
            else:
                text = _decoded(path.read_bytes(), path)
                yield from (part for part in (text.split(separator) if separator else [text]) if part.strip())
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}; make it readable or leave it out") from error


def _text_files(paths):
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl") and p.is_file())
            if not inside:
                raise DataError(f"{path}: no .txt or .jsonl file in this folder")
            files += inside
        elif not path.exists():
            raise DataError(f"{path}: no such file or folder")
        elif path.suffix not in (".txt", ".jsonl"):
            raise DataError(f"{path}: files of kind {path.suffix!r} are not read; give .txt or .jsonl")
        else:
            files.append(path)
    return files


def _jsonl_documents(path, text_key):
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                record = json.loads(_decoded(line, where))
            except DataError:
                raise
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON ({error}); each line must be one JSON value") from error
            text = record.get(text_key) if isinstance(record, dict) else record
            if not isinstance(text, str):
                keys = f"its keys are {sorted(record)}" if isinstance(record, dict) else f"it is {record!r:.60}"
                raise DataError(f"{where}: no text under {text_key!r}, {keys}; name the right one with --text_key")
            if text.strip():
                yield text


def _decoded(content, where):
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        place = f"{where}:{line}" if isinstance(where, Path) else where
        raise DataError(f"{place}: not UTF-8 (byte {error.start}: {error.reason}); convert it to UTF-8") from error
