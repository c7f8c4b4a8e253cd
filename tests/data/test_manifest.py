import json

import numpy as np
import pytest

from data import DataError
from data.manifest import Manifest, dataset_fingerprint, open_split, read_manifest, write_json_with_checksum
from data.shards import scan_shard, write_shard


@pytest.fixture
def folder(tmp_path):
    entries = []
    for name, split, count in (("s_val_000000.bin", "val", 5), ("s_train_000001.bin", "train", 9)):
        write_shard(tmp_path / name, np.arange(count))
        found = scan_shard(tmp_path / name)
        del found["crc32_of_all"]
        entries.append({"file": name, "split": split, "part": 0, **found})
    Manifest(name="s", source={"kind": "test"}, split_rule="by hand", shards=entries).write(tmp_path / "manifest.json")
    return tmp_path


def test_open_split_with_and_without_a_manifest(folder):
    assert [shard[:].tolist() for shard in open_split(folder, "train")] == [list(range(9))]
    write_shard(folder / "s_train_000002.bin", np.arange(3))  # not in the manifest: not part of the set
    assert len(open_split(folder, "train")) == 1
    assert dataset_fingerprint(folder)["train_tokens"] == 9
    (folder / "manifest.json").unlink()
    assert [len(shard) for shard in open_split(folder, "train")] == [9, 3]
    assert dataset_fingerprint(folder)["manifest_sha256"] is None
    np.save(folder / "s_train_000003.npy", np.arange(4, dtype=np.uint16))  # build-nanogpt's
    assert [len(shard) for shard in open_split(folder, "train")] == [9, 3, 4]


def test_what_is_wrong_with_a_folder_is_said(folder, tmp_path):
    with pytest.raises(DataError, match=r"nowhere.*data\.prepare"):
        open_split(tmp_path / "nowhere", "train")
    path = folder / "manifest.json"
    whole = path.read_text()
    content = json.loads(whole)
    content.pop("sha256_of_the_rest")

    def message(write):
        write()
        with pytest.raises(DataError) as error:
            open_split(folder, "train")
        assert "\n" not in str(error.value)
        return str(error.value)

    def sealed(change):
        return message(lambda: write_json_with_checksum(path, content | change))

    entries = [dict(shard) for shard in content["shards"]]
    entries[1]["tokens"] = 8
    assert "9 tokens" in sealed({"shards": entries})
    assert "another tokenizer" in sealed({"tokenizer_sha256": "0"})
    assert "format 99" in sealed({"format_version": 99})
    assert "no train shards" in sealed({"shards": []})
    for text in (
        "",
        "[1]",
        "null",
        "{}",
        "{",
        whole[:-100],
        "\ud800".encode("utf-8", "surrogatepass").decode("latin1"),
    ):
        assert "pretokenized DIR" in message(lambda text=text: path.write_text(text))
    for old, new in (('"tokens": 9', '"tokens": 8'), ('"train"', '"tram"'), ('"name": "s"', '"name": "t"')):
        assert "its checksum is not" in message(lambda old=old, new=new: path.write_text(whole.replace(old, new)))
    path.write_text(whole)
    (folder / "s_train_000001.bin").unlink()
    assert "s_train_000001.bin" in message(lambda: None)


def test_the_manifest_comes_back_as_it_was_written(folder):
    manifest = read_manifest(folder)
    manifest.write(folder / "again.json")
    assert (folder / "again.json").read_bytes() == (folder / "manifest.json").read_bytes()
    assert manifest.total("train", "tokens") == 9
    assert read_manifest(folder.parent) is None
