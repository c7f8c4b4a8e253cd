"""Read files of JSON lines, plain or compressed (.gz, .xz, .zst)."""

import contextlib
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from common.errors import UserError, one_line

COMPRESSIONS = (".gz", ".xz", ".zst")


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the location ("PATH:LINE") and the JSON value of each line that is not blank.

    Raises:
        UserError: the file cannot be read or is damaged, or a line is not JSON.
    """
    with name_unreadable_file(path), path.open("rb") as raw, decompress(raw, path.suffix) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path}:{number}"
                try:
                    text = line.decode("utf-8-sig")
                except UnicodeDecodeError as error:
                    raise UserError(f"{where}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
                yield where, parse_json(text, where)


def parse_json(text: str, where: str) -> Any:
    """Parse a line. Raises UserError, with its location, if it is not one JSON value."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); each line must be one JSON value") from error


def decompress(raw: BinaryIO, suffix: str) -> BinaryIO:
    """Return the content of an open file as the suffix of its name says: one of COMPRESSIONS, or plain."""
    if suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if suffix == ".xz":
        return cast(BinaryIO, lzma.LZMAFile(raw))
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd"))
    return raw


@contextlib.contextmanager
def name_unreadable_file(where: str | Path) -> Iterator[None]:
    """Turn errors of reading a file in the block into a UserError that names it."""
    try:
        yield
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{where}: damaged or truncated ({error}); copy the file again or leave it out") from error
    except OSError as error:  # pyarrow raises one without a number for a damaged .zst or .parquet file
        problem = error.strerror if error.errno else f"damaged or truncated ({one_line(error)})"
        raise UserError(f"{where}: {problem}; copy the file again, make it readable, or leave it out") from error
