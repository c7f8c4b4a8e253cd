"""Shards of llm.c and build-nanogpt, written by independent code."""

import struct

import numpy as np
import pytest
from hub_server import COMMIT
from shard_folders import content_of, llm_c

from data import DataError
from data.manifest import open_split
from data.pretokenized import import_shards
from data.verify import verify

RNG = np.random.RandomState(0)
TOKENS = {
    f"fineweb_{split}_{number:06d}": RNG.randint(0, 50257, 700)
    for split, number in [("val", 0), ("train", 1), ("train", 2), ("train", 3)]
}


@pytest.fixture(params=["bin", "npy"])
def folder(request, tmp_path):
    (tmp_path / "imported").mkdir()
    for name, tokens in TOKENS.items():
        if request.param == "bin":
            (tmp_path / "imported" / f"{name}.bin").write_bytes(llm_c(tokens))
        else:
            np.save(tmp_path / "imported" / f"{name}.npy", tokens.astype(np.uint16))
    return tmp_path / "imported"


def train_tokens(folder):
    return [shard[:].tolist() for shard in open_split(folder, "train")]


EXPECTED = [tokens.tolist() for name, tokens in TOKENS.items() if "train" in name]


@pytest.mark.parametrize("where", ["imported", "ours"])
def test_local_shards_are_used_in_place(folder, tmp_path, where):
    """The manifest is written next to the shards or into another folder."""
    before = content_of(folder)
    manifest = import_shards(folder, tmp_path / where, name="any")
    assert train_tokens(tmp_path / where) == EXPECTED
    assert manifest.total("train", "documents") == sum(tokens.count(50256) for tokens in EXPECTED)
    assert before.items() <= content_of(folder).items()
    assert {path.name for path in (tmp_path / "ours").glob("*")} <= {"manifest.json"}
    victim = next(folder.glob("*_train_000002*"))
    content = victim.read_bytes()
    victim.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    with pytest.raises(DataError, match=r"_train_000002\.\w+: bytes .* do not match their checksum"):
        train_tokens(tmp_path / where)
    with pytest.raises(DataError, match=r"_train_000002\.\w+ is not the file that .*copy it again"):
        import_shards(folder, tmp_path / where, name="any")
    victim.write_bytes(content)
    import_shards(folder, tmp_path / where, name="any")
    with pytest.raises(DataError, match="has shards of another source"):
        import_shards("kjj0/fineweb10B-gpt2", tmp_path / where, name="any")
    if where == "ours":
        with pytest.raises(DataError, match=rf"has the shards of {folder}: import that folder"):
            import_shards(tmp_path / where, tmp_path / "third", name="any")


def test_mistakes_are_refused(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file is a file"):
        import_shards(folder, tmp_path / "file")
    with pytest.raises(DataError, match="max_tokens must be at least 1, got 0"):
        import_shards(folder, tmp_path / "out", max_tokens=0)
    (folder / "preparing.json").touch()
    with pytest.raises(DataError, match="imported is not finished"):
        import_shards(folder, tmp_path / "out")
    (folder / "preparing.json").unlink()
    import_shards(folder, folder)
    victim = next(folder.glob("*_train_000002*"))
    victim.write_bytes(victim.read_bytes()[:-3] + b"\1" + victim.read_bytes()[-2:])
    with pytest.raises(
        DataError, match=r"is not the file that .*imported/manifest\.json describes; repair that folder"
    ):
        import_shards(folder, tmp_path / "out")


def test_damaged_shards_are_refused(folder, tmp_path):
    victim = next(folder.glob("*_train_000002*"))
    intact = victim.read_bytes()
    victim.write_bytes(intact[:-2])
    with pytest.raises(DataError, match=r"_train_000002"):
        import_shards(folder, tmp_path / "out", name="any")
    victim.write_bytes(intact[:-2] + struct.pack("<H", 50257))
    with pytest.raises(DataError, match=r"_train_000002\.\w+: token 699 is 50257"):
        import_shards(folder, tmp_path / "out", name="any")
    victim.write_bytes(intact)
    import_shards(folder, tmp_path / "out", name="any")
    assert train_tokens(tmp_path / "out") == EXPECTED
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no train shards; they are recognized by their names"):
        import_shards(tmp_path / "empty", tmp_path / "out2", name="any")
    with pytest.raises(DataError, match="no such folder"):
        import_shards(tmp_path / "nowhere", tmp_path / "out3", name="any")


def test_max_tokens_selects_complete_shards(folder, tmp_path):
    import_shards(folder, tmp_path / "out", name="any", max_tokens=800)
    assert train_tokens(tmp_path / "out") == EXPECTED[:2]


@pytest.fixture
def hub(client):
    client.repos["datasets/kjj0/fineweb10B-gpt2"] = {f"{name}.bin": llm_c(tokens) for name, tokens in TOKENS.items()}
    return client


def import_hub(tmp_path, **options):
    return import_shards("kjj0/fineweb10B-gpt2", tmp_path / "out", name="any", **options)


def downloads(hub):
    return {path for method, path in hub.log if method == "GET" and "resolve" in path}


def test_hub_shards_survive_faults_and_are_repaired(hub, tmp_path):
    hub.faults += [("GET .*train_000002", fault) for fault in ("drop", "corrupt", "truncate")]
    manifest = import_hub(tmp_path)
    assert manifest.source["revision"] == COMMIT
    assert train_tokens(tmp_path / "out") == EXPECTED
    before = content_of(tmp_path / "out")
    assert before.keys() == {"manifest.json", *(f"{name}.bin" for name in TOKENS)}
    victim = tmp_path / "out" / "fineweb_train_000002.bin"
    victim.write_bytes(victim.read_bytes()[:-2] + b"xx")
    hub.log.clear()
    hub.commits["datasets/kjj0/fineweb10B-gpt2"] = [("d" * 40, "a push in the meantime")]
    import_hub(tmp_path)
    assert content_of(tmp_path / "out") == before
    assert downloads(hub) == {f"/datasets/kjj0/fineweb10B-gpt2/resolve/{COMMIT}/fineweb_train_000002.bin"}


def test_interrupted_download_resumes(hub, tmp_path):
    hub.faults += [("GET .*train_000003", 404)]
    with pytest.raises(DataError, match="HTTP 404"):
        import_hub(tmp_path)
    for read in (train_tokens, verify):  # an incomplete folder is refused
        with pytest.raises(DataError, match=r"not finished.* the same `python -m data.prepare` command again"):
            read(tmp_path / "out")
    hub.log.clear()
    import_hub(tmp_path)
    assert train_tokens(tmp_path / "out") == EXPECTED
    assert not any("train_000001" in path or "train_000002" in path for path in downloads(hub))


def test_max_tokens_limits_the_downloads(hub, tmp_path):
    import_hub(tmp_path, max_tokens=700)
    assert train_tokens(tmp_path / "out") == EXPECTED[:1]
    assert not any("train_000002" in path for path in downloads(hub))


def test_missing_data_set_is_named(hub, tmp_path):
    with pytest.raises(DataError, match="no data set missing/missing"):
        import_shards("missing/missing", tmp_path / "out", name="any")
