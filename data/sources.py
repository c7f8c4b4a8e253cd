"""
Where documents come from. A source has

    settings            JSON-able dict: what was asked for, the same for the same documents
    inputs()            the files to read, in order: {"path", "bytes"} each
    fetch(input)        the path of a local copy
    records(input, path, progress)      its documents as `Record`s, in order
    done_with(path)     called when nobody needs the local copy any more
    note                what was found out about the documents beside the settings, for the manifest: a revision

A record is bytes as they stand in the file; the processes that tokenise it decode and parse it too (`document`).
"""

import ast
import glob
import gzip
import inspect
import json
import lzma
import os
import platform
import sysconfig
import zlib
from collections import deque
from pathlib import Path
from typing import NamedTuple

from data import DataError

# Test suites, bundled third-party code and an editor: hardly any prose, and not on every installation.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "ensurepip"}
# A module with less than a paragraph of documentation is no document.
_MIN_DOCSTRING_CHARACTERS = 200
_MIN_SAMPLE_CHARACTERS = 1_000_000

KINDS = (".txt", ".jsonl", ".parquet")
_COMPRESSIONS = (".gz", ".xz", ".zst")
_READ_BYTES = 1 << 20
_MAX_DOCUMENT_BYTES = 100_000_000  # a bound on memory, far above any document
_PARQUET_ROWS = 64  # a batch of rows: few enough that long documents do not pile up


class Record(NamedTuple):
    """One document, not decoded yet."""

    content: bytes
    """UTF-8 text, or a JSON value that holds it"""
    is_json: bool
    where: str
    """the file, for messages"""
    number: int
    """its first line in the file, or its row"""


class Progress:
    """How far reading has come; what reads writes it, what shows it reads it."""

    def __init__(self, total_bytes):
        self.total_bytes = total_bytes
        self.bytes_done = 0  # of inputs that are finished
        self.bytes_here = 0  # of the one being read


class SampleSource:
    """
    English prose that every Python carries: the language reference (pydoc_data.topics, a document a topic) and
    the standard library's docstrings (a document a source file). About 2 million characters, which differ a
    little between Python versions.
    """

    def __init__(self):
        self.provenance = {}
        self.settings = {"kind": "sample", "python": platform.python_version()}

    def inputs(self):
        return [{"path": "the documentation of Python " + platform.python_version(), "bytes": 3_000_000}]

    def fetch(self, file):
        return None

    def done_with(self, path):
        pass

    def records(self, file, path, progress):
        for number, text in enumerate(sample_documents(), start=1):
            yield Record(text.encode("utf-8", "replace"), False, file["path"], number)


def sample_documents():
    """
    Raises:
        DataError: this Python was stripped of its documentation.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it separately
        topics = {}

    documents = [topics[name] for name in sorted(topics)]
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(_python_files(library)):
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


def _python_files(library):
    for folder, folders, files in os.walk(library):
        folders[:] = set(folders) - _SKIPPED_FOLDERS  # others' packages, as many files again
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def docstrings(path):
    """The docstrings of a Python source file, in order, joined by blank lines; "" if it does not parse."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # some files of the standard library are broken on purpose
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in _statements(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))  # they come level by level
    found = (ast.get_docstring(node, clean=False) for node in nodes)
    return "\n\n".join(inspect.cleandoc(text) for text in found if text)


def _statements(tree):
    """ast.walk without expressions, which are most of a tree and hold no docstrings."""
    parts = (ast.stmt, ast.ExceptHandler, ast.match_case)
    waiting = deque([tree])
    while waiting:
        yield (node := waiting.popleft())
        for _, value in ast.iter_fields(node):
            if isinstance(value, list):
                waiting.extend(part for part in value if isinstance(part, parts))


class FileSource:
    """
    Files on this machine: .txt and .jsonl, each also compressed (.gz, .xz, .zst), and .parquet.

    A .txt file is a document, or several with a separator between them; a line of a .jsonl file or a row of a
    .parquet file is one.
    """

    def __init__(self, paths, *, text_column="text", separator=None, errors="strict"):
        """
        Args:
            paths: files, folders (searched for such files, in the order of their names), or patterns like
                "notes/**/*.txt".
            text_column: where the text stands: key of a .jsonl record (which may also be a bare string), column
                of a .parquet file.
            separator: what stands between the documents of a .txt file.
            errors: what to do with bytes that are not UTF-8: "strict" stops, "replace" puts U+FFFD.

        Raises:
            DataError: an empty separator.
        """
        if separator == "":
            raise DataError("the separator is empty; leave it out where a file is one document")
        self.text_column, self.separator, self.errors = text_column, separator, errors
        self.provenance = {}
        self.paths = [str(path) for path in paths]
        self.settings = {
            "kind": "files",
            "paths": self.paths,
            "text_column": text_column,
            "separator": separator,
            "errors": errors,
        }

    def inputs(self):
        """
        Raises:
            DataError: a path that is not there, a file of another kind, a folder or a pattern without any.
        """
        files = []
        for name in self.paths:
            path = Path(name)
            if path.is_dir():
                inside = sorted(p for p in path.rglob("*") if file_kind(p) and p.is_file())
                if not inside:
                    raise DataError(f"{path}: no {_kinds()} file in this folder")
                files += inside
            elif path.exists():
                files.append(_checked_kind(path))
            elif glob.has_magic(name):
                inside = [Path(found) for found in sorted(glob.glob(name, recursive=True))]  # noqa: PTH207  (relative or absolute)
                inside = [_checked_kind(found) for found in inside if found.is_file()]
                if not inside:
                    raise DataError(f"{name}: no file has a name like this")
                files += inside
            else:
                raise DataError(f"{path}: no such file or folder")
        return [{"path": str(path), "bytes": path.stat().st_size} for path in files]

    def fetch(self, file):
        return Path(file["path"])

    def done_with(self, path):
        pass

    def records(self, file, path, progress):
        """
        Raises:
            DataError: a file that cannot be read or is damaged, a .parquet file without the column, a document of
                more than 100 MB.
        """
        return file_records(
            path, where=file["path"], text_column=self.text_column, separator=self.separator, progress=progress
        )


def file_kind(path):
    """One of KINDS, or None for another kind of file."""
    path = Path(path)
    plain = path.with_suffix("") if path.suffix in _COMPRESSIONS else path
    if plain.suffix not in KINDS or (plain is not path and plain.suffix == ".parquet"):
        return None
    return plain.suffix


def _kinds():
    return ".txt, .jsonl (both also .gz, .xz, .zst) or .parquet"


def _checked_kind(path):
    if file_kind(path) is None:
        raise DataError(f"{path}: files of kind {''.join(path.suffixes[-2:])!r} are not read; give {_kinds()}")
    return path


def file_records(path, *, where, text_column, separator, progress):
    """`Record`s of one file; see FileSource."""
    try:
        if file_kind(path) == ".parquet":
            yield from _parquet_records(path, where, text_column, progress)
            return
        is_json = file_kind(path) == ".jsonl"
        between = "\n" if is_json else separator
        with path.open("rb") as raw, _decompressed(raw, path.suffix) as stream:
            for number, content in _between(stream, between and between.encode(), where, raw, progress):
                if content and not content.isspace():
                    yield Record(content, is_json, where, number)
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{where}: damaged or cut short ({error}); get the file again or leave it out") from error
    except OSError as error:  # pyarrow's, for a damaged .zst or .parquet, are OSErrors without a number
        what = error.strerror if error.errno else f"damaged or cut short ({' '.join(str(error).split())})"
        raise DataError(f"{where}: {what}; get the file again, make it readable, or leave it out") from error


def _decompressed(raw, suffix):
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix == ".xz":
        return lzma.LZMAFile(raw)
    if suffix == ".zst":
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
    return raw


def _between(stream, separator, where, raw, progress):
    """(line number, bytes) of what stands between separators; without one, of the whole."""
    number, rest = 1, b""
    lines_between = separator.count(b"\n") if separator else 0
    is_first = True
    while True:
        chunk = stream.read(max(_READ_BYTES, len(rest)))
        if is_first:
            chunk, is_first = chunk.removeprefix(b"\xef\xbb\xbf"), False  # a byte-order mark
        if not chunk:
            break
        progress.bytes_here = raw.tell()
        *pieces, rest = (rest + chunk).split(separator) if separator else [rest + chunk]
        for piece in pieces:
            yield number, piece
            number += lines_between if separator == b"\n" else piece.count(b"\n") + lines_between
        if len(rest) > _MAX_DOCUMENT_BYTES:
            raise DataError(
                f"{where}:{number}: a document of more than {_MAX_DOCUMENT_BYTES:,} bytes begins here; "
                "give the --separator that stands between documents, or split the file"
            )
    if rest:
        yield number, rest


def _parquet_records(path, where, text_column, progress):
    import pyarrow
    from pyarrow import parquet

    size = path.stat().st_size
    try:
        # Buffered reading, without whole column chunks in memory.
        with parquet.ParquetFile(path, buffer_size=_READ_BYTES, pre_buffer=False) as file:
            schema = file.schema_arrow
            if text_column not in schema.names:
                raise DataError(
                    f"{where}: no column {text_column!r}, its columns are {schema.names}; "
                    "name the right one with --text_column"
                )
            kind = schema.field(text_column).type
            if pyarrow.types.is_dictionary(kind):
                kind = kind.value_type
            if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
                raise DataError(
                    f"{where}: column {text_column!r} holds {kind} and not text; name another --text_column"
                )
            row = 0
            for batch in file.iter_batches(_PARQUET_ROWS, columns=[text_column], use_threads=False):
                column = batch.column(0)
                if pyarrow.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                for content in column.cast(pyarrow.large_binary()).to_pylist():
                    row += 1
                    if content and not content.isspace():
                        yield Record(content, False, where, row)
                progress.bytes_here = size * row // max(1, file.metadata.num_rows)
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{where}: damaged or no .parquet file ({' '.join(str(error).split())}); get the file again or leave it out"
        ) from error


def document(record, *, text_column="text", errors="strict"):
    """
    The text of a record.

    Returns:
        str. Half a surrogate pair, possible in JSON, is no Unicode text and becomes U+FFFD.

    Raises:
        DataError: bytes that are not UTF-8, a line that is not JSON, a JSON record without text.
    """
    where = f"{record.where}:{record.number}"
    try:
        text = record.content.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        line = record.number + record.content.count(b"\n", 0, error.start)
        raise DataError(
            f"{record.where}:{line}: not UTF-8 (byte {error.start} of the document: {error.reason}); "
            "convert the file to UTF-8, or give --errors replace"
        ) from error
    if not record.is_json:
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); each line must be one JSON value") from error
    text = value.get(text_column) if isinstance(value, dict) else value
    if not isinstance(text, str):
        found = f"its keys are {sorted(value)}" if isinstance(value, dict) else f"it is {value!r:.60}"
        raise DataError(f"{where}: no text under {text_column!r}, {found}; name the right one with --text_column")
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
