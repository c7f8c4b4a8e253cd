"""Sources of documents: the offline sample, and files on this machine.

A task is a file, a piece of a .parquet file, or a range of bytes of a large text file. A large compressed file has one
reader, `stream`, which cuts it into pieces for the workers: its task has "is_stream".
"""

import ast
import contextlib
import glob
import inspect
import itertools
import json
import os
import platform
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from common.jsonl import COMPRESSIONS, decompress, name_unreadable_file, parse_json
from data import DataError, parquet

# Test suites, bundled third-party code and an editor: little prose, and not in every installation.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "ensurepip"}
# A module with less than a paragraph of documentation is not a document.
_MIN_DOCSTRING_CHARACTERS = 200
_MIN_SAMPLE_CHARACTERS = 1_000_000

_KINDS = ".txt, .jsonl (both also .gz, .xz, .zst) or .parquet"
TASK_BYTES = 8_000_000  # of text in a task: enough tasks for all cores, and a kill loses little
_STREAM_BYTES = 4_000_000  # size from which a compressed file has pieces
_MAX_DOCUMENT_BYTES = 100_000_000  # a bound on memory, far above real documents
_SEARCH_BYTES = 1 << 20
_OVERLAP = 1000  # bytes, longer than separators are

# Where a text without separators can be cut, so that its tokens do not change: between a character that is not white
# space and a space or line break, where every match of GPT-2's pre-tokenization ends. Multi-byte characters count if
# their first byte is not that of any white space.
_CUT = re.compile(rb"(?:[!-~]|[\xc4-\xdf\xe4-\xf4][\x80-\xbf]+)(?=[ \n])")


class Document(NamedTuple):
    """A document, or a part of one."""

    text: str | None
    """None for a row without a text, which is skipped and counted"""
    starts: bool = True
    """False if it continues the previous one, which was cut in the middle"""


class Source(Protocol):
    """Documents in tasks. A source can be sent to a worker process; all its dicts can be written as JSON."""

    @property
    def settings(self) -> dict[str, Any]:
        """The requested documents; equal settings mean equal documents."""

    @property
    def provenance(self) -> dict[str, Any]:
        """Facts for the manifest that `tasks` found, for example the commit."""

    def tasks(self) -> list[dict[str, Any]]:
        """List what to read, in order: {"path", "bytes", ...} each."""

    def documents(self, task: Mapping[str, Any]) -> Iterator[Document]:
        """Yield the documents of a task, in order."""


class SampleSource:
    """English prose that comes with Python, about 2 million characters; it differs slightly between Python versions.

    The documents are the topics of the language reference (pydoc_data.topics) and the docstrings of each source file
    of the standard library.
    """

    def __init__(self) -> None:
        self.provenance: dict[str, Any] = {}
        self.settings = {"kind": "sample", "python": platform.python_version()}

    def tasks(self) -> list[dict[str, Any]]:
        """Return one task for all documents."""
        return [{"path": "the documentation of Python " + platform.python_version(), "bytes": 3_000_000}]

    def documents(self, task: Mapping[str, Any]) -> Iterator[Document]:
        """Yield the documents."""
        for text in sample_documents():
            yield Document(text.encode("utf-8", "replace").decode())


def sample_documents() -> list[str]:
    """Return the documents of the offline sample. Raises DataError if Python was installed without documentation."""
    documents = []
    with contextlib.suppress(ImportError):  # a separate package in some distributions
        from pydoc_data.topics import topics

        documents = [topics[name] for name in sorted(topics)]
    library, paths = Path(sysconfig.get_paths()["stdlib"]), []
    for folder, folders, names in os.walk(library):
        folders[:] = set(folders) - _SKIPPED_FOLDERS
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    documents += [text for text in map(docstrings, sorted(paths)) if len(text) >= _MIN_DOCSTRING_CHARACTERS]
    characters = sum(len(text) for text in documents)
    if characters < _MIN_SAMPLE_CHARACTERS:
        raise DataError(
            f"this Python's documentation has only {characters:,} characters ({library}); some packages of Python "
            "leave it out. Use your own text: `python -m data.prepare files PATH --out DIR`"
        )
    return documents


def docstrings(path: Path) -> str:
    """Return the docstrings of a Python source file, in order, joined by blank lines; "" if it does not parse."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # some files of the standard library are invalid on purpose
        return ""
    texts = (ast.get_docstring(node, clean=False) for node in _documented(tree))
    return "\n\n".join(inspect.cleandoc(text) for text in texts if text)


def _documented(node: ast.AST) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Walk a tree in the order of its lines, without expressions, which are most of it and have no docstrings."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        for child in getattr(node, field, ()):
            yield from _documented(child)


class FileSource:
    """Files on this machine: .txt and .jsonl, each also compressed (.gz, .xz, .zst), and .parquet.

    A .txt file is one document, or several with a separator between them. Each line of a .jsonl file and each row of a
    .parquet file is a document.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        text_column: str = "text",
        separator: str | None = None,
        errors: str = "strict",
    ) -> None:
        """Record the settings; `tasks` looks for the files.

        Args:
            paths: files, folders (searched for such files, in the order of their names), or patterns.
            text_column: key in a .jsonl record (which may also be just a string), or column of a .parquet file.
            separator: text between the documents of a .txt file; a line break in it matches CR LF, too.
            errors: for bytes that are not UTF-8: "strict" raises, "replace" puts U+FFFD.
        """
        if separator == "":
            raise DataError("the separator is empty; leave it out if each file is one document")
        self.text_column, self.separator, self.errors = text_column, separator, errors
        self.provenance: dict[str, Any] = {}
        self.paths = [str(path) for path in paths]
        self.skipped: list[Path] = []
        """files of other kinds in the folders, from the last call of `files`"""
        self.settings = {"kind": "files", "paths": self.paths, "text_column": text_column, "separator": separator}
        self.settings["errors"] = errors

    def files(self) -> list[Path]:
        """Find the files."""
        files: list[Path] = []
        self.skipped = []
        for name in self.paths:
            path = Path(name)
            if path.is_dir():
                inside = [p.relative_to(path) for p in sorted(path.rglob("*")) if p.is_file()]
                visible = [path / p for p in inside if not any(part.startswith(".") for part in p.parts)]
                matches = [p for p in visible if file_kind(p)]
                self.skipped += [p for p in visible if not file_kind(p)]
                if not matches:
                    raise DataError(f"{path}: no {_KINDS} file in this folder")
                files += matches
            elif path.exists():
                files.append(_checked_kind(path))
            elif glob.has_magic(name):
                matches = [Path(match) for match in sorted(glob.glob(name, recursive=True))]  # noqa: PTH207  (relative or absolute)
                matches = [_checked_kind(match) for match in matches if match.is_file()]
                if not matches:
                    raise DataError(f"{name}: no file matches this pattern")
                files += matches
            else:
                raise DataError(f"{path}: no such file or folder")
        return files

    def tasks(self) -> list[dict[str, Any]]:
        """List the files, large ones in pieces of TASK_BYTES."""
        tasks: list[dict[str, Any]] = []
        for path in self.files():
            size = path.stat().st_size
            task = {"path": str(path), "bytes": size}
            if file_kind(path) == ".parquet":
                tasks += [{**task, **piece} for piece in parquet.pieces(size)]
            elif path.suffix.lower() in COMPRESSIONS:
                tasks.append({**task, "is_stream": True} if size > _STREAM_BYTES else task)
            else:
                edges = [*range(0, max(size, 1), TASK_BYTES), size]
                tasks += [
                    {"path": str(path), "bytes": end - begin, "begin": begin, "end": end, "size": size}
                    for begin, end in itertools.pairwise(edges)
                ]
        return tasks

    def documents(self, task: Mapping[str, Any]) -> Iterator[Document]:
        """Yield the documents of a task, or of a piece of its `stream` in "piece_content"."""
        path = Path(task["path"])
        with name_unreadable_file(path):
            if file_kind(path) == ".parquet":
                rows = parquet.rows(path, task, text_column=self.text_column, where=str(path), errors=self.errors)
                yield from map(Document, rows)
                return
            pieces: Iterable[tuple[int, bytes]]
            if "piece_content" in task:
                pieces = [task["piece_content"]]
            elif "begin" in task:
                pieces = [self._range(path, task)]
            else:
                pieces = self.stream(task)
            for offset, content in pieces:
                yield from self._split(path, offset, content)

    def stream(self, task: Mapping[str, Any]) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, bytes) of pieces of a compressed file's content, cut between documents."""
        path = Path(task["path"])
        boundary = self._boundary(path)
        with name_unreadable_file(path), path.open("rb") as raw, decompress(raw, path.suffix.lower()) as stream:
            if task["bytes"] == 0:
                raise EOFError("0 bytes")
            offset, content, is_end = 0, b"", False
            while not is_end:
                chunk = stream.read(max(_SEARCH_BYTES, TASK_BYTES - len(content)))
                is_end = not chunk
                content += chunk
                cut = len(content) if is_end else _last_match(boundary, content)
                if len(content) >= TASK_BYTES or is_end:
                    if cut:
                        yield offset, content[:cut]
                    offset, content = offset + cut, content[cut:]
                    _check_length(len(content), path, offset)

    def _boundary(self, path: Path) -> re.Pattern[bytes]:
        """Return a pattern after whose matches a file can be cut."""
        if file_kind(path) == ".jsonl":
            return re.compile(rb"\n")
        if self.separator is None:
            return _CUT
        lines = self.separator.replace("\r\n", "\n").encode().split(b"\n")
        return re.compile(rb"\r?\n".join(map(re.escape, lines)))

    def _range(self, path: Path, task: Mapping[str, Any]) -> tuple[int, bytes]:
        """Read the task's range of bytes, from the first boundary in it to the first one after it."""
        boundary = self._boundary(path)
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != task["size"]:
                raise DataError(f"{path} has changed since the preparation began; remove the shards and start again")
            begin, end = (_next_boundary(file, boundary, task[name], task["size"], path) for name in ("begin", "end"))
            file.seek(begin)
            return begin, file.read(end - begin)

    def _split(self, path: Path, offset: int, content: bytes) -> Iterator[Document]:
        """Yield the documents in a part of a file that begins at `offset`."""
        is_json = file_kind(path) == ".jsonl"
        always_starts = is_json or bool(self.separator) or offset == 0
        start = 3 if offset == 0 and content.startswith(b"\xef\xbb\xbf") else 0  # a byte-order mark
        ends = [] if self.separator is None and not is_json else self._boundary(path).finditer(content, start)
        for match in itertools.chain(ends, [None]):
            end, next_start = match.span() if match else (len(content), len(content))
            part = content[start:end]
            if part and not part.isspace():
                locate = partial(_locate, path, offset + start)
                text = decode_text(part, is_json, text_column=self.text_column, errors=self.errors, locate=locate)
                yield Document(text, always_starts)
            start = next_start


def decode_text(
    content: bytes, is_json: bool, *, text_column: str, errors: str, locate: Callable[[int], str]
) -> str | None:
    """Return the text of a document or of a line of JSON; None if it is null.

    Half a surrogate pair, which JSON allows, becomes U+FFFD. `locate` returns the place of a byte, for messages.
    """
    try:
        text = content.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{locate(error.start)}: not UTF-8 (byte {error.start} of the document: {error.reason}); convert the file "
            "to UTF-8 (or let data.prepare replace them: --errors replace)"
        ) from error
    if not is_json:
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = parse_json(text, locate(0))  # raises, with the place
    field = value
    if isinstance(value, dict):
        if text_column not in value:
            found = f"its keys are {sorted(value)}"
        elif (field := value[text_column]) is None:
            return None
        else:
            found = f"but a {type(field).__name__}"
    else:
        found = f"it is {value!r:.60}"
    if not isinstance(field, str):
        raise DataError(f"{locate(0)}: no text under {text_column!r}, {found}; name the right key with --text_column")
    return field.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _next_boundary(file: BinaryIO, boundary: re.Pattern[bytes], position: int, size: int, path: Path) -> int:
    """Return the first end of a match at or after a position; 0 and the file's end are boundaries."""
    if position in (0, size):
        return position
    offset = max(0, position - _OVERLAP)
    file.seek(offset)
    tail = b""
    while chunk := file.read(_SEARCH_BYTES):
        content, base = tail + chunk, offset - len(tail)
        for match in boundary.finditer(content):
            if base + match.end() >= position and match.end() < len(content):
                return base + match.end()
        offset += len(chunk)
        tail = content[-_OVERLAP:]
        _check_length(offset - position, path, position)
    return size


def _last_match(boundary: re.Pattern[bytes], content: bytes) -> int:
    """Return the last end of a match before the end of the content, 0 without one."""
    for begin in (max(0, len(content) - _SEARCH_BYTES), 0):
        ends = [match.end() for match in boundary.finditer(content, begin) if match.end() < len(content)]
        if ends:
            return ends[-1]
    return 0


def _check_length(length: int, path: Path, offset: int) -> None:
    if length > _MAX_DOCUMENT_BYTES:
        raise DataError(
            f"{_locate(path, offset)}: a document of more than {_MAX_DOCUMENT_BYTES:,} bytes begins here; give "
            "the --separator between documents, or split the file"
        )


def _locate(path: Path, start: int, byte: int = 0) -> str:
    """Return "PATH:LINE" of the line that has byte start + byte of the (decompressed) file."""
    offset = start + byte
    with path.open("rb") as raw, decompress(raw, path.suffix.lower()) as stream:
        number = 1
        while offset > 0 and (chunk := stream.read(min(offset, 1 << 20))):
            number += chunk.count(b"\n")
            offset -= len(chunk)
        return f"{path}:{number}"


def file_kind(path: str | Path) -> str | None:
    """Return ".txt", ".jsonl" or ".parquet", or None for another kind of file."""
    path = Path(str(path).lower())  # B.TXT
    plain = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    if plain.suffix not in (".txt", ".jsonl", ".parquet") or (plain is not path and plain.suffix == ".parquet"):
        return None
    return plain.suffix


def _checked_kind(path: Path) -> Path:
    if file_kind(path) is None:
        raise DataError(f"{path}: files of kind {''.join(path.suffixes[-2:])!r} are not supported; give {_KINDS}")
    return path
