"""
Shards: files of tokens in llm.c's format, which the pretokenised FineWeb sets on the Hub have too.

    256 int32, little-endian    20240520 (magic), 1 (version), number of tokens, zeros
    tokens, uint16              each document led by token 50256

build-nanogpt's shards, one-dimensional uint16 arrays in NumPy's .npy format, are read as well. What a folder of them
holds stands in its manifest (manifest.py), among it a CRC-32 of each block of BLOCK_TOKENS tokens: `Shard` checks a
block the first time it is read from, so a token that is not the one that was written is an error and not training data.
"""

import hashlib
import mmap
import os
import zlib
from pathlib import Path

import numpy as np

from common.files import atomic_write, replace_file
from data import DataError
from data.tokenizer import EOT, VOCAB_SIZE

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
MAX_TOKENS = 2**31 - 1  # what the header's int32 can say
BLOCK_TOKENS = 32_768  # 64 KiB: a batch of random windows touches few bytes besides its own
REMEDY = "mend it with `python -m data.verify DIR --repair`, copy the file again, or prepare the folder again"


class Shard:
    """The tokens of one file, memory-mapped; slices of it are checked the first time their blocks are read."""

    def __init__(self, tokens, *, path=None, offset=HEADER_BYTES, crc32=None):
        """
        Args:
            tokens: [N] uint16 array, or memory map.
            path: the file that is mapped; None where there is none.
            offset: bytes of the file before the tokens.
            crc32: hex, 8 digits a block, as `scan_shard` gives them; None where nobody wrote them down, and then
                only ids that GPT-2 does not have are errors.
        """
        self.tokens, self.path, self.offset = tokens, path, offset
        self._crc32 = crc32
        self._is_checked = np.zeros(-(-len(tokens) // BLOCK_TOKENS), dtype=bool)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, window):
        """
        Args:
            window: a slice of neighbouring tokens.

        Returns:
            [n] uint16 array, a view of the file.

        Raises:
            DataError: the file has other tokens there than were written, or ids that GPT-2 does not have.
        """
        begin, end, _ = window.indices(len(self.tokens))
        first, last = begin // BLOCK_TOKENS, -(-end // BLOCK_TOKENS)
        if not self._is_checked[first:last].all():
            for block in range(first, last):
                if not self._is_checked[block]:
                    self._check(block)
        return self.tokens[begin:end]

    def _check(self, block):
        begin = block * BLOCK_TOKENS
        tokens = self.tokens[begin : begin + BLOCK_TOKENS]
        if self.path is not None:
            # Read, and not through the map, which would take the block from the disk page by page.
            try:
                with self.path.open("rb", buffering=0) as file:
                    file.seek(self.offset + 2 * begin)
                    content = file.read(2 * len(tokens))
            except OSError as error:
                raise DataError(f"{self.path}: {error.strerror or error}; {REMEDY}") from error
            if len(content) != 2 * len(tokens):
                raise DataError(f"{self.path}: became shorter while it was read; {REMEDY}")
            tokens = np.frombuffer(content, dtype="<u2")
        self.check_block(block, tokens, f"{zlib.crc32(tokens):08x}")
        self._is_checked[block] = True

    def check_block(self, block, tokens, crc32):
        """
        Args:
            block: its number.
            tokens: what stands there.
            crc32: theirs, 8 hex digits.

        Raises:
            DataError: they are not what was written, or not GPT-2's.
        """
        begin = block * BLOCK_TOKENS
        if self._crc32 is not None and crc32 != self._crc32[8 * block : 8 * block + 8]:
            raise DataError(f"{self.path}: {self.byte_range(begin, len(tokens))} are not what was written; {REMEDY}")
        self.check_ids(tokens, begin)

    def byte_range(self, begin, count):
        """Where `count` tokens from `begin` on stand in the file: "bytes 1,024 to 66,559"."""
        first = self.offset + 2 * begin
        return f"bytes {first:,} to {first + 2 * count - 1:,}"

    def check_ids(self, tokens, begin):
        """
        Args:
            tokens: [n] token ids, those of the shard from `begin` on.

        Raises:
            DataError: an id that GPT-2 does not have; names the file and the token's place in it.
        """
        if len(tokens) and tokens.max() >= VOCAB_SIZE:
            place = int((tokens >= VOCAB_SIZE).argmax())
            raise DataError(
                f"{self.path or 'shard'}: token {begin + place:,} is {tokens[place]}, and GPT-2 has only {VOCAB_SIZE}: "
                f"made with another tokenizer, or damaged at {self.byte_range(begin + place, 1)}; {REMEDY}"
            )


class ShardWriter:
    """
    The shards of one split, written as their documents come: {prefix}000.bin, {prefix}001.bin, ...

    A document never crosses two shards: one is closed when the next document would not fit. A file is written under
    another name, flushed to the disk, read again, and renamed.
    """

    def __init__(self, folder, prefix, *, shard_tokens, executor):
        """
        Args:
            folder: where to write.
            prefix: of the files' names.
            shard_tokens: most tokens in a shard (a longer document has a shard to itself).
            executor: concurrent.futures.Executor of threads, where shards are finished while others are written.
        """
        self.folder, self.prefix, self.shard_tokens = Path(folder), prefix, shard_tokens
        self._executor, self._finishing = executor, []
        self._file = None

    def add(self, tokens, lengths):
        """
        Args:
            tokens: [N] uint16, whole documents one after the other.
            lengths: [D] int, tokens in each of them.

        Raises:
            OSError: it cannot be written.
        """
        ends = np.cumsum(lengths)
        document = start = 0
        while document < len(lengths):
            if self._file is None:
                self._open()
            fitting = int(np.searchsorted(ends, start + self.shard_tokens - self._num_tokens, side="right"))
            if fitting <= document:
                if self._num_tokens:
                    self._close()
                    continue
                fitting = document + 1
            part = np.ascontiguousarray(tokens[start : ends[fitting - 1]], dtype="<u2")
            self._file.write(part)
            self._crc32 = zlib.crc32(part, self._crc32)
            self._num_tokens += len(part)
            document, start = fitting, int(ends[fitting - 1])

    def _open(self):
        path = self.folder / f"{self.prefix}{len(self._finishing):03d}.bin"
        self._file = _tmp_path(path).open("wb")
        self._path, self._num_tokens, self._crc32 = path, 0, 0
        self._file.write(bytes(HEADER_BYTES))

    def _close(self):
        file, self._file = self._file, None
        self._finishing.append(self._executor.submit(_finish_shard, file, self._path, self._num_tokens, self._crc32))

    def finish(self):
        """
        Returns:
            list of `scan_shard`'s dicts with "file", in order: every shard, whole and on the disk.

        Raises:
            OSError: it cannot be written.
            DataError: the disk gives back other bytes than were written.
        """
        if self._file is not None:
            self._close()
        return [future.result() for future in self._finishing]

    def abandon(self):
        """Closes what is open and removes what is not whole."""
        for future in self._finishing:
            future.cancel() or future.exception()  # waits for one that runs
        if self._file is not None:
            self._file.close()
            _tmp_path(self._path).unlink(missing_ok=True)


def _finish_shard(file, path, num_tokens, crc32):
    with file:
        file.seek(0)
        file.write(_header(num_tokens))
        file.flush()
        os.fsync(file.fileno())
    tmp_path = _tmp_path(path)
    found = scan_shard(tmp_path)
    if found.pop("crc32_of_all") != crc32 or found["tokens"] != num_tokens:
        raise DataError(f"{path}: the disk gave back other bytes than were written to it; check the disk")
    replace_file(tmp_path, path)
    return {"file": path.name, **found}


def _tmp_path(path):
    return path.with_name(f".{path.name}.partial")


def _header(num_tokens):
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, num_tokens
    return header


def write_shard(path, tokens):
    """
    Writes one shard under another name, then renames it.

    Args:
        path: the file.
        tokens: [N] token ids.

    Raises:
        DataError: an id outside the vocabulary.
    """
    path = Path(path)
    tokens = np.asarray(tokens)
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < VOCAB_SIZE:
        raise DataError(f"{path}: token ids {tokens.min()} to {tokens.max()} do not fit GPT-2's {VOCAB_SIZE} tokens")
    write_and_rename(path, _header(len(tokens)), np.ascontiguousarray(tokens, dtype="<u2"))


def write_and_rename(path, *parts):
    """Bytes, or arrays as they lie in memory, to a file that is there whole or not at all."""
    with atomic_write(path) as tmp_path, tmp_path.open("wb") as file:
        for part in parts:  # one after the other: joined, a shard of 200 MB would be in memory once more
            file.write(part)


def open_shard(path, crc32=None):
    """
    Args:
        path: a .bin file in llm.c's format, or a .npy file as build-nanogpt writes them.
        crc32: see `Shard`.

    Returns:
        Shard.

    Raises:
        DataError: the file is missing, or its header and size are not those of a whole shard.
    """
    path = Path(path)
    try:
        offset, count = _npy_extent(path) if path.suffix == ".npy" else _bin_extent(path)
        if count == 0:
            return Shard(np.zeros(0, dtype="<u2"), path=path, offset=offset, crc32=crc32)
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; {REMEDY}") from error
    if hasattr(content, "madvise"):
        # Windows are read in random order: without this, each page comes with the megabytes around it.
        content.madvise(mmap.MADV_RANDOM)
    tokens = np.frombuffer(content, dtype="<u2", offset=offset, count=count)
    return Shard(tokens, path=path, offset=offset, crc32=crc32)


def _bin_extent(path):
    """(bytes before the tokens, number of tokens)"""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), dtype="<i4")
    magic, version, count = (int(value) for value in header[:3])
    if size < HEADER_BYTES:
        raise DataError(
            f"{path}: {size} bytes are less than a shard's header of {HEADER_BYTES} "
            f"(bytes {size:,} to {HEADER_BYTES - 1:,} are missing); {REMEDY}"
        )
    if magic != MAGIC:
        raise DataError(f"{path}: not a token shard (bytes 0 to 3 are {magic}, those of a shard {MAGIC}); {REMEDY}")
    if version != VERSION:
        raise DataError(f"{path}: shard version {version} (bytes 4 to 7), this program reads {VERSION}; {REMEDY}")
    expected = HEADER_BYTES + 2 * count
    if count < 0 or size != expected:
        where = f"bytes {size:,} to {expected - 1:,} are missing" if size < expected else f"bytes from {expected:,} on"
        raise DataError(
            f"{path}: the header (bytes 8 to 11) promises {count:,} tokens, {expected:,} bytes, and the file has "
            f"{size:,}: torn or still being written ({where}); {REMEDY}"
        )
    return HEADER_BYTES, count


def _npy_extent(path):
    """(bytes before the tokens, number of tokens)"""
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, SyntaxError) as error:
        raise DataError(f"{path}: not a whole .npy file ({' '.join(str(error).split())}); {REMEDY}") from error
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype != "<u2":
        found = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, np.ndarray) else "an archive"
        raise DataError(f"{path}: {found}, and a shard is uint16 [N]; {REMEDY}")
    offset = path.stat().st_size - tokens.nbytes
    if offset != getattr(tokens, "offset", offset):
        raise DataError(f"{path}: longer than its header says; {REMEDY}")
    return offset, len(tokens)


def scan_shard(path, crc32=None):
    """
    Reads a whole shard.

    Args:
        crc32: see `Shard`.

    Returns:
        dict: "tokens", "documents" (tokens 50256), "sha256" (of the file, hex), "crc32" (of each block of
        BLOCK_TOKENS tokens, 8 hex digits each) and "crc32_of_all" (of all tokens, a number).

    Raises:
        DataError: as `open_shard`; tokens that were not written, or that GPT-2 does not have.
    """
    path = Path(path)
    shard = open_shard(path, crc32)
    sha256, crcs, crc32_of_all, documents = hashlib.sha256(), [], 0, 0
    block_bytes = 2 * BLOCK_TOKENS
    try:
        with path.open("rb") as file:
            sha256.update(file.read(shard.offset))
            for begin in range(0, len(shard), BLOCK_TOKENS):
                content = file.read(min(block_bytes, 2 * (len(shard) - begin)))
                block = np.frombuffer(content, dtype="<u2")
                sha256.update(content)
                crcs.append(f"{zlib.crc32(content):08x}")
                shard.check_block(begin // BLOCK_TOKENS, block, crcs[-1])
                crc32_of_all = zlib.crc32(content, crc32_of_all)
                documents += int(np.count_nonzero(block == EOT))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; {REMEDY}") from error
    return {
        "tokens": len(shard),
        "documents": documents,
        "sha256": sha256.hexdigest(),
        "crc32": "".join(crcs),
        "crc32_of_all": crc32_of_all,
    }
