import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import DataError
from data.shards import Manifest, identity, open_shard, open_split, write_shard


def independent_read(path):
    """llm.c's format read with struct alone."""
    content = path.read_bytes()
    header = struct.unpack("<256i", content[:1024])
    assert header[:2] == (20240520, 1)
    assert header[3:] == (0,) * 253
    return list(struct.unpack(f"<{header[2]}H", content[1024:]))


def independent_write(path, tokens):
    path.write_bytes(
        struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253) + struct.pack(f"<{len(tokens)}H", *tokens)
    )


@settings(max_examples=30, deadline=None)
@given(tokens=st.lists(st.integers(0, 50256), min_size=1, max_size=200))
def test_round_trip_and_exchange(tmp_path_factory, tokens):
    folder = tmp_path_factory.mktemp("shards")
    write_shard(folder / "a.bin", np.array(tokens))
    assert independent_read(folder / "a.bin") == tokens
    independent_write(folder / "b.bin", tokens)
    assert open_shard(folder / "b.bin").tolist() == tokens
    assert open_shard(folder / "b.bin").dtype == np.uint16
    assert {p.name for p in folder.iterdir()} == {"a.bin", "b.bin"}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content[:-2], ["header promises 10 tokens", "1,042"]),
        (lambda content: content + b"\0\0", ["header promises 10 tokens", "1,046"]),
        (lambda content: content[:500], ["500 bytes", "header"]),
        (lambda content: b"", ["0 bytes"]),
        (lambda content: b"PK\x03\x04" + content[4:], ["not a token shard"]),
        (lambda content: content[:4] + struct.pack("<i", 2) + content[8:], ["version 2"]),
        (lambda content: content[:8] + struct.pack("<i", -1) + content[12:], ["torn"]),
    ],
)
def test_damaged_shards_are_named(tmp_path, damage, words):
    path = tmp_path / "x_train_000001.bin"
    write_shard(path, np.arange(10))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError) as error:
        open_shard(path)
    for word in [str(path), *words]:
        assert word in str(error.value)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_mutated_header_or_length_reads_as_another_number_of_tokens(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("mutated") / "m.bin"
    write_shard(path, np.arange(20))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, 11))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with pytest.raises(DataError):
        open_shard(path)


def test_ids_outside_the_vocabulary_are_not_written(tmp_path):
    with pytest.raises(DataError, match="50257"):
        write_shard(tmp_path / "a.bin", np.array([1, 50257]))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder(tmp_path):
    shards = []
    for name, split, count in (("s_val_000000.bin", "val", 5), ("s_train_000001.bin", "train", 9)):
        sha256 = write_shard(tmp_path / name, np.arange(count))
        shards.append({"file": name, "split": split, "tokens": count, "documents": 1, "sha256": sha256})
    Manifest(source={"kind": "test"}, split_rule="by hand", shards=shards).write(tmp_path)
    return tmp_path


def test_open_split_with_and_without_a_manifest(folder):
    assert [shard.tolist() for shard in open_split(folder, "train")] == [list(range(9))]
    write_shard(folder / "s_train_000002.bin", np.arange(3))  # not in the manifest: not part of the set
    assert len(open_split(folder, "train")) == 1
    assert identity(folder)["train_tokens"] == 9
    (folder / "manifest.json").unlink()
    assert [len(shard) for shard in open_split(folder, "train")] == [9, 3]
    assert identity(folder)["manifest_sha256"] is None


def test_what_is_wrong_with_a_folder_is_said(folder, tmp_path):
    with pytest.raises(DataError, match=r"nowhere.*data\.prepare"):
        open_split(tmp_path / "nowhere", "train")
    manifest = json.loads((folder / "manifest.json").read_text())

    def broken(change):
        (folder / "manifest.json").write_text(json.dumps(change))
        with pytest.raises(DataError) as error:
            open_split(folder, "train")
        return str(error.value)

    shards = [dict(shard) for shard in manifest["shards"]]
    shards[1]["tokens"] = 8
    assert "9 tokens" in broken(manifest | {"shards": shards})
    assert "not a manifest" in broken({"shards": []})
    assert "not a manifest" in broken([1])
    assert "not a manifest" in broken(manifest | {"shards": [{"file": "a"}]})
    assert "another tokenizer" in broken(manifest | {"tokenizer_sha256": "0"})
    assert "format 99" in broken(manifest | {"format_version": 99})
    assert "no train shards" in broken(manifest | {"shards": []})
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "s_train_000001.bin").unlink()
    with pytest.raises(DataError, match=r"s_train_000001\.bin"):
        open_split(folder, "train")
