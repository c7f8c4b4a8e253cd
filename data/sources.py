"""Sources of documents.

A source has

    settings            JSON-able dict: the requested documents; equal settings mean equal documents
    provenance          JSON-able dict for the manifest: facts found while fetching, for example the commit
    inputs()            the files to read, in order: {"path", "bytes"} each
    fetch(input)        returns the path of a local copy
    records(input, path, progress)      yields the documents of a file as `Record`s, in order
    done_with(path)     releases the local copy

A record has the bytes of the file; the tokenizer processes decode and parse it (`decode_record`).
"""

import ast
import contextlib
import glob
import inspect
import os
import platform
import re
import sysconfig
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from common.jsonl import COMPRESSIONS, decompress, name_unreadable_file, parse_json
from data import DataError

# Test suites, bundled third-party code and an editor: little prose, and not in every installation.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "ensurepip"}
# A module with less than a paragraph of documentation is not a document.
_MIN_DOCSTRING_CHARACTERS = 200
_MIN_SAMPLE_CHARACTERS = 1_000_000

KINDS = (".txt", ".jsonl", ".parquet")
_READ_BYTES = 1 << 20
_MAX_DOCUMENT_BYTES = 100_000_000  # a bound on memory, far above real documents
_PARQUET_ROWS = 64  # rows per batch: few, so that a batch of long documents fits in memory


class Document(NamedTuple):
    """A document, or a part of one."""

    text: str
    where: str
    """file and line or row, for messages"""
    starts: bool = True
    """False if it continues the previous one, which was cut in the middle"""
    is_null: bool = False
    """True for a row without a text, which is skipped and counted"""


class Record(NamedTuple):
    """One document, not decoded yet."""

    content: bytes
    """UTF-8 text, or a JSON value that has it"""
    is_json: bool
    """True if `content` is a JSON value"""
    where: str
    """file name for messages"""
    number: int
    """number of the document's first line in the file, or of its row"""
    is_null: bool = False
    """True for a row without a text"""


class Progress:
    """Reading progress: updated by the reader, shown by the display."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.bytes_done = 0  # of finished inputs
        self.bytes_here = 0  # of the input being read


class SampleSource:
    """English prose that comes with Python, about 2 million characters; it differs slightly between Python versions.

    The documents are the topics of the language reference (pydoc_data.topics) and the docstrings of each source file
    of the standard library.
    """

    def __init__(self) -> None:
        self.provenance: dict[str, Any] = {}
        self.settings = {"kind": "sample", "python": platform.python_version()}

    def inputs(self) -> list[dict[str, Any]]:
        """Return one input for all documents."""
        return [{"path": "the documentation of Python " + platform.python_version(), "bytes": 3_000_000}]

    def fetch(self, file: dict[str, Any]) -> Path:
        """Return the folder of the standard library."""
        return Path(sysconfig.get_paths()["stdlib"])

    def done_with(self, path: Path) -> None:
        """Do nothing: `fetch` makes no copy."""

    def records(self, file: dict[str, Any], path: Path, progress: Progress) -> Iterator[Record]:
        """Yield the documents."""
        for number, text in enumerate(sample_documents(), start=1):
            yield Record(text.encode("utf-8", "replace"), False, file["path"], number)


def sample_documents() -> Iterator[str]:
    """Yield the documents of the offline sample. Raises DataError if Python was installed without documentation."""
    documents = []
    with contextlib.suppress(ImportError):  # a separate package in some distributions
        from pydoc_data.topics import topics

        documents = [topics[name] for name in sorted(topics)]
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(_python_files(library)):
        text = docstrings(path)
        if len(text) >= _MIN_DOCSTRING_CHARACTERS:
            documents.append(text)
    characters = sum(len(text) for text in documents)
    if characters < _MIN_SAMPLE_CHARACTERS:
        raise DataError(
            f"this Python's documentation has only {characters:,} characters ({library}); some packages of Python "
            "leave it out. Use your own text: `python -m data.prepare files PATH --out DIR`"
        )
    yield from documents


def _python_files(library: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(library):
        folders[:] = set(folders) - _SKIPPED_FOLDERS
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def docstrings(path: Path) -> str:
    """Return the docstrings of a Python source file, in order, joined by blank lines; "" if it does not parse."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # some files of the standard library are invalid on purpose
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in _statements(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))  # _statements yields them level by level
    texts = (ast.get_docstring(node, clean=False) for node in nodes)
    return "\n\n".join(inspect.cleandoc(text) for text in texts if text)


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Walk a tree without its expressions, which are most of it and have no docstrings."""
    parts = (ast.stmt, ast.ExceptHandler, ast.match_case)
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        yield (node := waiting.popleft())
        for _, value in ast.iter_fields(node):
            if isinstance(value, list):
                waiting.extend(part for part in value if isinstance(part, parts))


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
        """Record the settings; `inputs` looks for the files.

        Args:
            paths: files, folders (searched for such files, in the order of their names), or patterns like
                "notes/**/*.txt".
            text_column: key of the text in a .jsonl record (which may also be just a string), or column of a .parquet
                file.
            separator: text between the documents of a .txt file.
            errors: for bytes that are not UTF-8: "strict" raises, "replace" puts U+FFFD.

        Raises:
            DataError: the separator is empty.
        """
        if separator == "":
            raise DataError("the separator is empty; leave it out if each file is one document")
        self.text_column, self.separator, self.errors = text_column, separator, errors
        self.provenance: dict[str, Any] = {}
        self.paths = [str(path) for path in paths]
        self.skipped: list[Path] = []
        """files of other kinds in the folders, from the last call of `inputs`"""
        self.settings = {
            "kind": "files",
            "paths": self.paths,
            "text_column": text_column,
            "separator": separator,
            "errors": errors,
        }

    def inputs(self) -> list[dict[str, Any]]:
        """List the files."""
        files: list[Path] = []
        self.skipped = []
        for name in self.paths:
            path = Path(name)
            if path.is_dir():
                inside = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
                matches = [p for p in inside if file_kind(p)]
                self.skipped += [p for p in inside if not file_kind(p)]
                if not matches:
                    raise DataError(f"{path}: no {_kinds()} file in this folder")
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
        return [{"path": str(path), "bytes": path.stat().st_size} for path in files]

    def fetch(self, file: dict[str, Any]) -> Path:
        """Return the path of the file."""
        return Path(file["path"])

    def done_with(self, path: Path) -> None:
        """Do nothing: the file is the user's."""

    def records(self, file: dict[str, Any], path: Path, progress: Progress) -> Iterator[Record]:
        """Yield the documents of a file."""
        return file_records(
            path, where=file["path"], text_column=self.text_column, separator=self.separator, progress=progress
        )


def file_kind(path: str | Path) -> str | None:
    """Return one of KINDS, or None for another kind of file."""
    path = Path(str(path).lower())  # B.TXT
    plain = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    if plain.suffix not in KINDS or (plain is not path and plain.suffix == ".parquet"):
        return None
    return plain.suffix


def _kinds() -> str:
    return ".txt, .jsonl (both also .gz, .xz, .zst) or .parquet"


def _checked_kind(path: Path) -> Path:
    if file_kind(path) is None:
        raise DataError(f"{path}: files of kind {''.join(path.suffixes[-2:])!r} are not supported; give {_kinds()}")
    return path


def file_records(
    path: Path, *, where: str, text_column: str, separator: str | None, progress: Progress
) -> Iterator[Record]:
    """Yield the documents of one file; see FileSource."""
    with name_unreadable_file(where):
        if file_kind(path) == ".parquet":
            yield from _parquet_records(path, where, text_column, progress)
            return
        is_json = file_kind(path) == ".jsonl"
        pieces_end = b"\n" if is_json else separator.encode() if separator else None
        suffix = path.suffix.lower()
        if suffix in COMPRESSIONS and path.stat().st_size == 0:
            raise EOFError("0 bytes")
        with path.open("rb") as raw, decompress(raw, suffix) as stream:
            for number, content in _split_stream(stream, pieces_end, where, raw, progress):
                if content and not content.isspace():
                    yield Record(content, is_json, where, number)


def _split_stream(
    stream: BinaryIO, separator: bytes | None, where: str, raw: BinaryIO, progress: Progress
) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, bytes) of each piece between separators, or of the entire stream without a separator."""
    number, rest = 1, b""
    lines_between = separator.count(b"\n") if separator else 0
    split = _splitter(separator) if separator else lambda content: [content]
    is_first = True
    while True:
        chunk = stream.read(max(_READ_BYTES, len(rest)))
        if is_first:
            chunk, is_first = chunk.removeprefix(b"\xef\xbb\xbf"), False  # a byte-order mark
        if not chunk:
            break
        progress.bytes_here = raw.tell()
        *pieces, rest = split(rest + chunk)
        for piece in pieces:
            yield number, piece
            number += lines_between if separator == b"\n" else piece.count(b"\n") + lines_between
        if len(rest) > _MAX_DOCUMENT_BYTES:
            raise DataError(
                f"{where}:{number}: a document of more than {_MAX_DOCUMENT_BYTES:,} bytes begins here; "
                "give the --separator between documents, or split the file"
            )
    if rest:
        yield number, rest


def _splitter(separator: bytes) -> Callable[[bytes], list[bytes]]:
    r"""Return a function that splits at a separator, whose line breaks match \r\n, too."""
    if separator == b"\n":  # the same pieces, but for \r at their ends, which is white space
        return lambda content: content.split(b"\n")
    lines = separator.replace(b"\r\n", b"\n").split(b"\n")
    return re.compile(rb"\r?\n".join(map(re.escape, lines))).split


def _parquet_records(path: Path, where: str, text_column: str, progress: Progress) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    size = path.stat().st_size
    try:
        # Buffered reading does not load entire column chunks into memory.
        with parquet.ParquetFile(path, buffer_size=_READ_BYTES, pre_buffer=False) as file:
            schema = file.schema_arrow
            if text_column not in schema.names:
                raise DataError(
                    f"{where}: no column {text_column!r}, only {schema.names}; name the right one with --text_column"
                )
            kind = schema.field(text_column).type
            if pyarrow.types.is_dictionary(kind):
                kind = kind.value_type
            if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
                raise DataError(f"{where}: column {text_column!r} has {kind}, not text; name another --text_column")
            row = 0
            for batch in file.iter_batches(_PARQUET_ROWS, columns=[text_column], use_threads=False):
                column = batch.column(0)
                if pyarrow.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                for content in column.cast(pyarrow.large_binary()).to_pylist():
                    row += 1
                    if content is None:
                        yield Record(b"", False, where, row, is_null=True)
                    elif content and not content.isspace():
                        yield Record(content, False, where, row)
                progress.bytes_here = size * row // max(1, file.metadata.num_rows)
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{where}: damaged or not a .parquet file ({' '.join(str(error).split())}); copy the file again or leave "
            "it out"
        ) from error


def decode_record(record: Record, *, text_column: str = "text", errors: str = "strict") -> str | None:
    """Return the text of a record, see FileSource; None if it is null.

    Half a surrogate pair, which JSON allows, is not Unicode text and becomes U+FFFD.
    """
    if record.is_null:
        return None
    where = f"{record.where}:{record.number}"
    try:
        text = record.content.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        line = record.number + record.content.count(b"\n", 0, error.start)
        raise DataError(
            f"{record.where}:{line}: not UTF-8 (byte {error.start} of the document: {error.reason}); "
            "convert the file to UTF-8 (or let data.prepare replace them: --errors replace)"
        ) from error
    if not record.is_json:
        return text
    value = parse_json(text, where)
    field = value.get(text_column) if isinstance(value, dict) else value
    if field is None and isinstance(value, dict) and text_column in value:
        return None
    if not isinstance(field, str):
        content = f"its keys are {sorted(value)}" if isinstance(value, dict) else f"it is {value!r:.60}"
        if field is not None and isinstance(value, dict):
            content = f"but a {type(field).__name__}"
        raise DataError(f"{where}: no text under {text_column!r}, {content}; name the right key with --text_column")
    text = field
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
