"""Shards: the format, damage, checksums, and writing."""

import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_folders import independent_read, llm_c

from data import DataError, shards
from data.shards import BLOCK_TOKENS, Shard, ShardWriter, open_shard, scan_shard, write_shard
from data.tokenizer import EOT


@settings(max_examples=30, deadline=None)
@given(tokens=st.lists(st.integers(0, 50256), min_size=1, max_size=200))
def test_round_trip_and_reading_by_independent_code(tmp_path_factory, tokens):
    folder = tmp_path_factory.mktemp("shards")
    write_shard(folder / "a.bin", np.array(tokens))
    assert independent_read(folder / "a.bin") == tokens
    (folder / "b.bin").write_bytes(llm_c(tokens))
    assert open_shard(folder / "b.bin")[:].tolist() == tokens
    assert open_shard(folder / "b.bin")[:].dtype == np.uint16
    np.save(folder / "c.npy", np.array(tokens, dtype=np.uint16))
    assert open_shard(folder / "c.npy")[:].tolist() == tokens
    assert {p.name for p in folder.iterdir()} == {"a.bin", "b.bin", "c.npy"}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content[:-2], ["10 tokens by the header", "1,042", "bytes 1,042 to 1,043 are missing"]),
        (lambda content: content + b"\0\0", ["10 tokens by the header", "1,046", "bytes from 1,044 on"]),
        (lambda content: content[:500], ["500 bytes", "header", "bytes 500 to 1,023 are missing"]),
        (lambda content: b"", ["0 bytes"]),
        (lambda content: b"PK\x03\x04" + content[4:], ["not a token shard"]),
        (lambda content: content[:4] + struct.pack("<i", 2) + content[8:], ["version 2"]),
        (lambda content: content[:8] + struct.pack("<i", -1) + content[12:], ["truncated"]),
    ],
)
def test_damaged_headers_and_sizes_are_errors(tmp_path, damage, words):
    path = tmp_path / "x_train_000001.bin"
    write_shard(path, np.arange(10))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError) as error:
        open_shard(path)
    for word in [str(path), "prepare the folder again", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.arange(10, dtype=np.int64), "int64"),
        (np.zeros((2, 5), dtype=np.uint16), r"\[2, 5\]"),
        (np.arange(10, dtype=">u2"), ">u2"),
        (np.array([None]), "not a complete .npy"),  # saved as a pickle
    ],
)
def test_other_npy_files_are_refused(tmp_path, array, words):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=words):
        open_shard(tmp_path / "x.npy")


def test_truncated_npy_files_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(100, dtype=np.uint16))
    content = (tmp_path / "x.npy").read_bytes()
    for damaged in (content[:-2], content + b"\0\0", content[:50], b"", b"PK" + content[2:]):
        (tmp_path / "x.npy").write_bytes(damaged)
        with pytest.raises(DataError, match=r"x\.npy"):
            open_shard(tmp_path / "x.npy")


def test_ids_outside_the_vocabulary_are_not_written(tmp_path):
    with pytest.raises(DataError, match="50257"):
        write_shard(tmp_path / "a.bin", np.array([1, 50257]))
    assert not list(tmp_path.iterdir())


def test_changed_token_is_an_error_only_in_its_block(tmp_path):
    path = tmp_path / "a.bin"
    tokens = np.random.RandomState(0).randint(0, 50257, 3 * BLOCK_TOKENS + 100)
    write_shard(path, tokens)
    crc32 = scan_shard(path)["crc32"]
    assert np.array_equal(open_shard(path, crc32)[:], tokens)
    content = bytearray(path.read_bytes())
    index = BLOCK_TOKENS + 5
    content[1024 + 2 * index] ^= 1  # still in the vocabulary
    path.write_bytes(content)
    shard = open_shard(path, crc32)
    assert np.array_equal(shard[:BLOCK_TOKENS], tokens[:BLOCK_TOKENS])
    assert np.array_equal(shard[2 * BLOCK_TOKENS :], tokens[2 * BLOCK_TOKENS :])
    for window in (slice(index, index + 1), slice(BLOCK_TOKENS - 1, BLOCK_TOKENS + 1), slice(None)):
        with pytest.raises(
            DataError, match=r"bytes 66,560 to 132,095 do not match their checksum.*prepare the folder again"
        ):
            shard[window]
    assert open_shard(path)[index : index + 1] != tokens[index]  # undetected without a checksum


def test_token_outside_the_vocabulary_is_an_error():
    tokens = np.arange(100, dtype=np.uint16)
    tokens[41] = 60000
    with pytest.raises(DataError, match=r"token 41 is 60000.*bytes 1,106 to 1,107"):
        Shard(tokens)[40:50]


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60), size=st.integers(1, 50), cuts=st.integers(1, 9))
def test_shard_ends_when_the_next_document_does_not_fit(tmp_path_factory, lengths, size, cuts):
    folder = tmp_path_factory.mktemp("written")
    documents = [[EOT, *range(length - 1)] for length in lengths]
    with ThreadPoolExecutor(1) as executor:
        writer = ShardWriter(folder, "w_train_", shard_tokens=size, executor=executor)
        for start in range(0, len(documents), cuts):  # in batches of any size
            batch = documents[start : start + cuts]
            writer.add(np.concatenate(batch).astype(np.uint16), [len(document) for document in batch])
        entries = writer.finish()
    expected = [[]]
    for document in documents:  # the slow reference
        if expected[-1] and len(expected[-1]) + len(document) > size:
            expected.append([])
        expected[-1] += document
    assert [entry["file"] for entry in entries] == sorted(path.name for path in folder.iterdir())
    assert [independent_read(folder / entry["file"]) for entry in entries] == expected
    assert [entry["documents"] for entry in entries] == [tokens.count(EOT) for tokens in expected]


def test_writer_detects_a_disk_that_returns_other_bytes(tmp_path, monkeypatch):
    original = shards._header

    def scribble(*arguments):  # after the tokens were written, before they are read again
        path = next(tmp_path.glob(".*.partial"))
        with path.open("r+b") as file:
            file.seek(1030)
            file.write(b"\7\7")
        return original(*arguments)

    monkeypatch.setattr(shards, "_header", scribble)
    with ThreadPoolExecutor(1) as executor:
        writer = ShardWriter(tmp_path, "w_train_", shard_tokens=100, executor=executor)
        writer.add(np.arange(50, dtype=np.uint16), [50])
        with pytest.raises(DataError, match="other bytes than were written"):
            writer.finish()
