"""Shards: files of tokens in llm.c's formats, as the pretokenized FineWeb data sets on the Hub.

    256 int32, little-endian    20240520 (magic), 1 (version), number of tokens, zeros
    tokens, uint16              each document begins with the eos token, 50256 for GPT-2's

Vocabularies of more than 65,536 tokens have uint32 tokens, and llm.c's magic and version for them: 20240801, 7.

Two other formats can be read: build-nanogpt's one-dimensional arrays in NumPy's .npy format, and nanoGPT's train.bin
and val.bin, tokens without a header. A folder's manifest (manifest.py) has a CRC-32 of each block of BLOCK_TOKENS
tokens. `Shard` checks a block before its first use, so a damaged token is an error and never training data.
"""

import contextlib
import hashlib
import mmap
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from common.errors import one_line
from common.files import atomic_write, replace_file
from data import DataError
from data.tokenizer import GPT2_VOCABULARY, Vocabulary

MAGIC, VERSION = 20240520, 1
FORMATS: dict[np.dtype, tuple[int, int]] = {np.dtype("<u2"): (MAGIC, VERSION), np.dtype("<u4"): (20240801, 7)}
HEADER_BYTES = 256 * 4
MAX_TOKENS = 2**31 - 1  # the largest int32 in the header
BLOCK_TOKENS = 32_768  # 64 KiB of uint16: checking the blocks of random windows reads little more than the windows
HEADERLESS_NAMES = ("train.bin", "val.bin")  # nanoGPT's
REMEDY = "copy the file again, or prepare the folder again, which makes only damaged shards"


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError in the block into a DataError that names the file and the remedy."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; {REMEDY}") from error


class Shard:
    """The memory-mapped tokens of one file. Slicing checks each block before its first use."""

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        vocabulary: Vocabulary = GPT2_VOCABULARY,
        path: Path | None = None,
        offset: int = HEADER_BYTES,
        crc32: str | None = None,
    ) -> None:
        """Wrap tokens, [N] uint16 or uint32, which begin at byte `offset` of the mapped file `path`, if there is one.

        Without `crc32`, the checksums of the blocks from `scan_shard`, only ids outside the vocabulary are errors.
        """
        self.tokens, self.vocabulary, self.path, self.offset = tokens, vocabulary, path, offset
        self._crc32, self._itemsize = crc32, tokens.dtype.itemsize
        self._is_checked = np.zeros(-(-len(tokens) // BLOCK_TOKENS), dtype=bool)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def dtype(self) -> np.dtype:
        """Type of the tokens, uint16 or uint32."""
        return self.tokens.dtype

    def __getitem__(self, window: slice) -> np.ndarray:
        """Return a contiguous slice of tokens, a view of the file. Raises DataError if they are damaged."""
        begin, end, _ = window.indices(len(self.tokens))
        first, last = begin // BLOCK_TOKENS, -(-end // BLOCK_TOKENS)
        for index in np.flatnonzero(~self._is_checked[first:last]):
            self._check(first + int(index))
        return self.tokens[begin:end]

    def _check(self, block: int) -> None:
        begin = block * BLOCK_TOKENS
        tokens = self.tokens[begin : begin + BLOCK_TOKENS]
        if self.path is not None:
            # Not through the map, which would read the block from the disk page by page.
            with reading(self.path), self.path.open("rb", buffering=0) as file:
                file.seek(self.offset + self._itemsize * begin)
                content = file.read(self._itemsize * len(tokens))
            if len(content) != self._itemsize * len(tokens):
                raise DataError(f"{self.path}: became shorter while it was being read; {REMEDY}")
            tokens = np.frombuffer(content, dtype=self.dtype)
        self.check_block(block, tokens)
        self._is_checked[block] = True

    def check_block(self, block: int, tokens: np.ndarray) -> str:
        """Check a block's tokens, as read from the file; return their CRC-32, 8 hex digits.

        Raises DataError if they differ from those that were written, or are not in the vocabulary.
        """
        begin = block * BLOCK_TOKENS
        crc32 = f"{zlib.crc32(tokens.data):08x}"
        if self._crc32 is not None and crc32 != self._crc32[8 * block : 8 * block + 8]:
            raise DataError(f"{self.path}: {self._bytes(begin, len(tokens))} do not match their checksum; {REMEDY}")
        size = self.vocabulary.size
        if len(tokens) and tokens.max() >= size:
            index = int((tokens >= size).argmax())
            is_gpt2 = self.vocabulary == GPT2_VOCABULARY
            owner = "GPT-2, assumed unless --tokenizer names another," if is_gpt2 else "the tokenizer"
            raise DataError(
                f"{self.path or 'shard'}: token {begin + index:,} is {tokens[index]}, and {owner} has only {size:,} "
                f"tokens: made with another tokenizer, or damaged at {self._bytes(begin + index, 1)}; {REMEDY}"
            )
        return crc32

    def _bytes(self, begin: int, count: int) -> str:
        """Return where in the file `count` tokens from `begin` on are: "bytes 1,024 to 66,559"."""
        first = self.offset + self._itemsize * begin
        return f"bytes {first:,} to {first + self._itemsize * count - 1:,}"


class ShardWriter:
    """Write documents to the shards of one split: {prefix}000.bin, {prefix}001.bin, ...

    A document is never split over two shards: a shard ends when the next document does not fit in shard_tokens, and a
    longer document gets its own. A file is written under another name, flushed to the disk, read again, and renamed.
    """

    def __init__(
        self,
        folder: str | Path,
        prefix: str,
        *,
        shard_tokens: int,
        executor: Executor,
        vocabulary: Vocabulary = GPT2_VOCABULARY,
    ) -> None:
        """Prepare to write; the threads of `executor` finish shards while others are written."""
        self.folder, self.prefix, self.shard_tokens = Path(folder), prefix, shard_tokens
        self._executor, self._vocabulary = executor, vocabulary
        self._finishing: list[Future[dict[str, Any]]] = []
        self._file: BinaryIO | None = None
        self._num_tokens = self._crc32 = 0  # of the open file

    def add(self, tokens: np.ndarray, lengths: Sequence[int] | np.ndarray) -> None:
        """Write documents: their tokens, [N], concatenated, and the number of tokens in each, [D]."""
        ends = np.cumsum(lengths)
        document = start = 0
        while document < len(lengths):
            file = self._file or self._open()
            end = int(np.searchsorted(ends, start + self.shard_tokens - self._num_tokens, side="right"))
            if end <= document:
                if self._num_tokens:
                    self._close(file)
                    continue
                end = document + 1
            part = np.ascontiguousarray(tokens[start : ends[end - 1]], dtype=self._vocabulary.dtype).data
            file.write(part)
            self._crc32 = zlib.crc32(part, self._crc32)
            self._num_tokens += len(part)
            document, start = end, int(ends[end - 1])

    def _open(self) -> BinaryIO:
        self._path = self.folder / f"{self.prefix}{len(self._finishing):03d}.bin"
        self._file = _tmp_path(self._path).open("wb")
        self._num_tokens = self._crc32 = 0
        self._file.write(bytes(HEADER_BYTES))
        return self._file

    def _close(self, file: BinaryIO) -> None:
        self._file = None
        future = self._executor.submit(_finish_shard, file, self._path, self._num_tokens, self._crc32, self._vocabulary)
        self._finishing.append(future)

    def finish(self) -> list[dict[str, Any]]:
        """Wait until all shards are on the disk; return `scan_shard`'s dict of each, with "file", in order."""
        if self._file is not None:
            self._close(self._file)
        return [future.result() for future in self._finishing]

    def abandon(self) -> None:
        """Close the open file and remove unfinished files."""
        for future in self._finishing:
            future.cancel() or future.exception()  # waits for a running one
        if self._file is not None:
            self._file.close()
            _tmp_path(self._path).unlink(missing_ok=True)


def _finish_shard(file: BinaryIO, path: Path, num_tokens: int, crc32: int, vocabulary: Vocabulary) -> dict[str, Any]:
    with file:
        file.seek(0)
        file.write(_header(num_tokens, vocabulary.dtype))
        file.flush()
        os.fsync(file.fileno())
    tmp_path = _tmp_path(path)
    scan = scan_shard(tmp_path, vocabulary=vocabulary)
    if scan.pop("crc32_of_all") != crc32 or scan["tokens"] != num_tokens:
        raise DataError(f"{path}: the disk returned other bytes than were written; check the disk")
    replace_file(tmp_path, path)
    return {"file": path.name, **scan}


def _tmp_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _header(num_tokens: int, dtype: np.dtype) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = *FORMATS[dtype], num_tokens
    return header.tobytes()


def check_space(folder: Path, needed: float) -> None:
    """Raise DataError if a folder's disk has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{folder} needs about {needed / 1e9:,.2f} GB, but its disk has only {free / 1e9:,.2f} GB free; free some "
            "space, use another disk, or give --max_tokens"
        )


def write_shard(path: str | Path, tokens: Sequence[int] | np.ndarray, vocabulary: Vocabulary = GPT2_VOCABULARY) -> None:
    """Write a shard under another name, then rename it. Raises DataError for an id outside the vocabulary."""
    tokens = np.asarray(tokens)
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocabulary.size:
        raise DataError(
            f"{path}: token ids {tokens.min()} to {tokens.max()} do not fit a vocabulary of {vocabulary.size} tokens"
        )
    with atomic_write(path) as tmp_path, tmp_path.open("wb") as file:
        file.write(_header(len(tokens), vocabulary.dtype))
        file.write(np.ascontiguousarray(tokens, dtype=vocabulary.dtype).data)


def open_shard(path: str | Path, crc32: str | None = None, *, vocabulary: Vocabulary = GPT2_VOCABULARY) -> Shard:
    """Map a shard into memory, in any format that this file names (`crc32` and `vocabulary`: see `Shard`).

    Raises DataError for anything but a complete shard of the vocabulary's type of tokens.
    """
    path, dtype = Path(path), vocabulary.dtype
    with reading(path):
        offset, count = _npy_extent(path, dtype) if path.suffix == ".npy" else _bin_extent(path, dtype)
        if count == 0:
            return Shard(np.zeros(0, dtype), vocabulary=vocabulary, path=path, offset=offset, crc32=crc32)
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(content, "madvise"):
        # Windows are read in random order: without this, each page fault reads the megabytes around the page.
        content.madvise(mmap.MADV_RANDOM)
    tokens = np.frombuffer(content, dtype=dtype, offset=offset, count=count)
    return Shard(tokens, vocabulary=vocabulary, path=path, offset=offset, crc32=crc32)


def _bin_extent(path: Path, dtype: np.dtype) -> tuple[int, int]:
    """Return the number of bytes before the tokens and the number of tokens."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), dtype="<i4")
    magic, version, count = (int(value) for value in header[:3])
    file_dtype = next((other for other, (other_magic, _) in FORMATS.items() if other_magic == magic), None)
    if file_dtype is None and path.name in HEADERLESS_NAMES:
        if size % dtype.itemsize:
            raise DataError(f"{path}: {size:,} bytes are not a multiple of {dtype.itemsize}, a token's; {REMEDY}")
        return 0, size // dtype.itemsize
    if size < HEADER_BYTES:
        raise DataError(
            f"{path}: {size} bytes, and the header of a shard has {HEADER_BYTES} "
            f"(bytes {size:,} to {HEADER_BYTES - 1:,} are missing); {REMEDY}"
        )
    if file_dtype is None:
        raise DataError(f"{path}: not a token shard (bytes 0 to 3 are {magic}, a shard has {MAGIC}); {REMEDY}")
    if file_dtype != dtype:
        raise DataError(_wrong_dtype(path, file_dtype, dtype))
    if version != FORMATS[dtype][1]:
        raise DataError(f"{path}: shard version {version} (bytes 4 to 7), expected {FORMATS[dtype][1]}; {REMEDY}")
    expected = HEADER_BYTES + dtype.itemsize * count
    if count < 0 or size != expected:
        where = f"bytes {size:,} to {expected - 1:,} are missing" if size < expected else f"bytes from {expected:,} on"
        raise DataError(
            f"{path}: {size:,} bytes, but {count:,} tokens by the header (bytes 8 to 11) need {expected:,} bytes: "
            f"truncated or still being written ({where}); {REMEDY}"
        )
    return HEADER_BYTES, count


def _npy_extent(path: Path, dtype: np.dtype) -> tuple[int, int]:
    """Return the number of bytes before the tokens and the number of tokens."""
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, SyntaxError) as error:
        raise DataError(f"{path}: not a complete .npy file ({one_line(error)}); {REMEDY}") from error
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype not in FORMATS:
        content = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, np.ndarray) else "an archive"
        raise DataError(f"{path}: {content}, but a shard is {dtype} [N]; {REMEDY}")
    if tokens.dtype != dtype:
        raise DataError(_wrong_dtype(path, np.dtype(tokens.dtype), dtype))
    offset = path.stat().st_size - tokens.nbytes
    if offset != getattr(tokens, "offset", offset):
        raise DataError(f"{path}: longer than its header says; {REMEDY}")
    return offset, len(tokens)


def _wrong_dtype(path: Path, found: np.dtype, expected: np.dtype) -> str:
    return (
        f"{path}: {found} tokens, and those of the tokenizer (GPT-2's unless --tokenizer names one) are {expected}: "
        "import the shards with `python -m data.prepare pretokenized FOLDER --tokenizer NAME`"
    )


def scan_shard(
    path: str | Path, crc32: str | None = None, *, vocabulary: Vocabulary = GPT2_VOCABULARY
) -> dict[str, Any]:
    """Read all of a shard (see `open_shard`), check it and compute its checksums.

    Returns:
        "tokens", "documents" (number of eos tokens), "sha256" (of the file, hex), "crc32" (of each block of
        BLOCK_TOKENS tokens, 8 hex digits each) and "crc32_of_all" (of all tokens, an int).
    """
    path = Path(path)
    shard = open_shard(path, crc32, vocabulary=vocabulary)
    sha256, crcs, crc32_of_all, documents = hashlib.sha256(), [], 0, 0
    itemsize = shard.dtype.itemsize
    with reading(path), path.open("rb") as file:
        sha256.update(file.read(shard.offset))
        for begin in range(0, len(shard), BLOCK_TOKENS):
            content = file.read(itemsize * min(BLOCK_TOKENS, len(shard) - begin))
            block = np.frombuffer(content, dtype=shard.dtype)
            sha256.update(content)
            crcs.append(shard.check_block(begin // BLOCK_TOKENS, block))
            crc32_of_all = zlib.crc32(content, crc32_of_all)
            documents += int(np.count_nonzero(block == vocabulary.eos_id))
    return {
        "tokens": len(shard),
        "documents": documents,
        "sha256": sha256.hexdigest(),
        "crc32": "".join(crcs),
        "crc32_of_all": crc32_of_all,
    }
