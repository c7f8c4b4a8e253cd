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
        scan = scan_shard(tmp_path / name)
        del scan["crc32_of_all"]
        entries.append({"file": name, "split": split, "part": 0, **scan})
    Manifest(name="s", source={"kind": "test"}, split_rule="by hand", shards=entries).write(tmp_path / "manifest.json")
    return tmp_path


def test_open_split_with_and_without_a_manifest(folder):
    assert [shard[:].tolist() for shard in open_split(folder, "train")] == [list(range(9))]
    write_shard(folder / "s_train_000002.bin", np.arange(3))  # ignored: not in the manifest
    assert len(open_split(folder, "train")) == 1
    assert dataset_fingerprint(folder)["train_tokens"] == 9
    (folder / "manifest.json").unlink()
    assert [len(shard) for shard in open_split(folder, "train")] == [9, 3]
    assert dataset_fingerprint(folder)["manifest_sha256"] is None
    np.save(folder / "s_train_000003.npy", np.arange(4, dtype=np.uint16))  # build-nanogpt's
    assert [len(shard) for shard in open_split(folder, "train")] == [9, 3, 4]


def test_damaged_or_missing_folder_is_an_error(folder, tmp_path):
    with pytest.raises(DataError, match=r"nowhere.*data\.prepare"):
        open_split(tmp_path / "nowhere", "train")
    path = folder / "manifest.json"
    intact = path.read_text()
    content = json.loads(intact)
    content.pop("sha256_of_the_rest")

    def message(write):
        write()
        with pytest.raises(DataError) as error:
            open_split(folder, "train")
        assert "\n" not in str(error.value)
        return str(error.value)

    def with_checksum(change):
        return message(lambda: write_json_with_checksum(path, content | change))

    entries = [dict(shard) for shard in content["shards"]]
    entries[1]["tokens"] = 8
    assert "9 tokens" in with_checksum({"shards": entries})
    assert "another tokenizer" in with_checksum({"tokenizer": {"name": "gpt2", "sha256": "0"}})
    assert "format 99" in with_checksum({"format_version": 99})
    assert "no train shards" in with_checksum({"shards": []})
    for text in (
        "",
        "[1]",
        "null",
        "{}",
        "{",
        intact[:-100],
        "\ud800".encode("utf-8", "surrogatepass").decode("latin1"),
    ):
        assert "pretokenized DIR" in message(lambda text=text: path.write_text(text))
    for old, new in (('"tokens": 9', '"tokens": 8'), ('"train"', '"tram"'), ('"name": "s"', '"name": "t"')):
        assert "its checksum does not match" in message(
            lambda old=old, new=new: path.write_text(intact.replace(old, new))
        )
    path.write_text(intact)
    (folder / "s_train_000001.bin").unlink()
    assert "s_train_000001.bin" in message(lambda: None)


def test_manifest_round_trip(folder):
    manifest = read_manifest(folder)
    manifest.write(folder / "again.json")
    assert (folder / "again.json").read_bytes() == (folder / "manifest.json").read_bytes()
    assert manifest.total("train", "tokens") == 9
    assert read_manifest(folder.parent) is None
