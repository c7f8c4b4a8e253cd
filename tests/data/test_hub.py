"""Data sets from a Hub on localhost, read with the real client, with and without faults."""

import gzip
import io
import json
import pickle

import datasets
import huggingface_hub
import pyarrow
import pytest
from hub_server import COMMIT, TOKEN
from huggingface_hub import constants
from pyarrow import parquet

from data import DataError
from data import parquet as pieces
from data import prepare as prepare_module
from data.hub import DatasetSource

TEXTS = [f"Document {i}. " + "Some words of it, again and again. " * (i % 9) for i in range(90)]


def parquet_file(texts, **columns):
    sink = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": texts, "id": range(len(texts)), **columns}), sink, row_group_size=10)
    return sink.getvalue()


CARD = b"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
- config_name: only-test
  data_files:
  - split: test
    path: data/*/*
---
"""
FILES = {f"sample/10BT/00{i}.parquet": parquet_file(TEXTS[30 * i : 30 * i + 30]) for i in range(3)}
REPO = {**FILES, "data/CC-MAIN-1/000.parquet": parquet_file(["another subset"]), "README.md": CARD}


@pytest.fixture
def hub(client, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", client.address)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)  # several pieces per file
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    client.repos["datasets/o/n"] = REPO
    return client


def put(hub, files):
    """Replace the files of o/n, under the same commit."""
    hub.repos["datasets/o/n"] = files
    huggingface_hub.HfFileSystem.clear_instance_cache()


def documents(dataset="o/n", **options):
    source = DatasetSource(dataset, **options)
    tasks = json.loads(json.dumps(source.tasks()))
    source = pickle.loads(pickle.dumps(source))  # as for a worker
    return [document for task in tasks for document in source.documents(task)]


def texts(*arguments, **options):
    return [document.text for document in documents(*arguments, **options)]


def error(*arguments, **options):
    with pytest.raises(DataError) as caught:
        documents(*arguments, **options)
    assert "\n" not in str(caught.value)
    assert not hasattr(caught.value.__cause__, "request")  # the client's exception, which has the token
    return str(caught.value)


def test_subset_in_pieces(hub):
    source = DatasetSource("o/n", subset="sample-10BT")
    tasks = source.tasks()
    assert list(dict.fromkeys(task["path"] for task in tasks)) == sorted(FILES)
    assert tasks[0]["pieces"] >= 3
    assert sum(task["bytes"] for task in tasks) == sum(map(len, FILES.values()))
    assert source.provenance == {"revision": COMMIT}
    hub.log.clear()
    assert [document.text for task in tasks for document in source.documents(task)] == TEXTS
    assert all("/resolve/" in path for _, path in hub.log)  # a worker lists nothing
    assert texts("o/n") == ["another subset"]


def test_restart_continues_with_the_pinned_commit(hub):
    hub.commits["datasets/o/n"] = [("d" * 40, "a push in the meantime")]
    source = DatasetSource("o/n", commit=COMMIT)
    source.tasks()
    assert source.provenance == {"revision": COMMIT}
    assert not any("d" * 40 in path or "main" in path for _, path in hub.log)
    assert source.settings == DatasetSource("o/n").settings


@pytest.mark.parametrize("fault", [429, 500, "drop", "truncate"])
def test_transient_faults_are_retried(hub, fault, capfd):
    hub.faults += [(pattern, fault) for pattern in ("GET .*resolve.*001", "GET .*resolve.*002")]
    if fault != "truncate":  # half a list of files is not JSON
        hub.faults += [(pattern, fault) for pattern in ("GET .*/revision/main", "tree.*data", "tree.*10BT")]
    assert texts(subset="sample-10BT") == TEXTS
    assert hub.faults == []


@pytest.mark.parametrize("where", ["tree.*sample", "GET .*resolve.*002", "README"])
def test_lasting_faults_are_errors_and_never_fewer_documents(hub, where):
    hub.faults += [(where, 500)] * 200
    assert "HTTP 500" in error(subset="sample-10BT")


def test_null_rows_blank_rows_and_dictionaries(hub):
    column = pyarrow.array(["one", None, "", " \n", "one"]).dictionary_encode()
    put(hub, {"train.parquet": parquet_file(column)})
    found = documents()
    assert [d.text for d in found] == ["one", None, "one"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dataset": "missing/missing"}, "no data set missing/missing"),
        ({"dataset": "a b"}, "not the name of a data set"),
        ({"revision": "v9"}, "no revision 'v9'; check --revision"),
        ({"subset": "sample-9T"}, "only-test"),
        ({"subset": "only-test"}, "no split 'train', only test; choose with --split"),
        (
            {"text_column": "body"},
            "000.parquet: no column 'body', only text, id; choose with --text_column",
        ),
        ({"text_column": "id"}, "column 'id' is int64, not text"),
    ],
)
def test_names_that_do_not_exist(hub, options, words):
    assert words in error(**options)


def test_private_and_gated_data_sets(hub, monkeypatch):
    hub.private.add("datasets/o/n")
    assert "you may not read it" in error()
    hub.private.clear()
    hub.gated.add("datasets/o/n")
    assert "is gated: accept its terms on" in error()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert texts() == ["another subset"]


def test_unreadable_content(hub):
    def with_file(name, content):
        put(hub, {name: content})

    with_file("train.parquet", parquet_file([["a"], ["b"]]))
    assert "column 'text' is list<element: string>, not text" in error()
    with_file("train.parquet", FILES["sample/10BT/000.parquet"][:-100])
    assert "o/n/train.parquet: damaged or not a .parquet file" in error()
    not_utf8 = pyarrow.StringArray.from_buffers(1, *pyarrow.array([b"\xff"]).buffers()[1:])
    with_file("train.parquet", parquet_file(not_utf8))
    assert "train.parquet: row 1 is not UTF-8" in error()
    assert texts(errors="replace") == ["\ufffd"]
    with_file("n.py", b"x")
    assert "no longer runs such programs" in error()
    with_file("picture.xyz", b"x")
    assert "refs/convert/parquet" in error()


def test_other_formats(hub):
    lines = "".join(
        json.dumps({"text": text, "changes": i if i % 2 else "its type"}) + "\n" for i, text in enumerate(TEXTS)
    )
    put(hub, {"train.jsonl": lines.encode(), "test.jsonl": b'{"text": "no"}\n'})
    assert texts() == TEXTS
    put(hub, {"train.jsonl.gz": gzip.compress(lines.encode())})
    assert texts() == TEXTS
    put(hub, {"train.jsonl": b'{"text": "half \\ud83d of it"}\n{"text": null}\n'})
    assert texts() == ["half \ufffd of it", None]
    assert "train.jsonl:1: no text under 'body', its keys are ['text']" in error(text_column="body")
    put(hub, {"train.txt": b"one\r\ndocument\n"})
    assert texts() == ["one\r\ndocument\n"]
    put(hub, {"train.csv": b"text,n\none,1\n,2\n"})
    assert texts() == ["one", None]
    assert "train.csv: no column 'body', only text, n" in error(text_column="body")


def test_local_parquet_file_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 100)
    path = tmp_path / "a.parquet"
    path.write_bytes(FILES["sample/10BT/000.parquet"])
    tasks = pieces.pieces(path.stat().st_size)
    assert len(tasks) > 3  # more pieces than row groups: some have no rows
    rows = [row for task in tasks for row in pieces.rows(path, task, text_column="text", where="a.parquet")]
    assert rows == TEXTS[:30]


def test_network_failures_and_offline_mode(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert "HF_HUB_OFFLINE is set" in error()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    hub.faults += [("revision", 403)]
    message = error()
    assert "HTTP 403" in message
    assert TOKEN not in message
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "request to http://127.0.0.1:9 failed after 6 attempts (ConnectError" in error()


def test_resuming_and_repairing_read_the_commit_of_the_start(hub, tmp_path, monkeypatch):
    options = {"name": "t", "val_fraction": 0.2}
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare_module.prepare(DatasetSource("o/n", subset="sample-10BT"), tmp_path / "out", **options)
    hub.log.clear()
    manifest = prepare_module.prepare(DatasetSource("o/n", subset="sample-10BT"), tmp_path / "out", **options)
    assert manifest.source["revision"] == COMMIT
    assert not any("revision/main" in path for _, path in hub.log)
    before = {shard["file"]: (tmp_path / "out" / shard["file"]).read_bytes() for shard in manifest.shards}
    (tmp_path / "out" / manifest.shards[0]["file"]).unlink()
    hub.log.clear()
    prepare_module.prepare(DatasetSource("o/n", subset="sample-10BT"), tmp_path / "out", **options)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in before} == before
    assert any("resolve" in path for _, path in hub.log)
    assert all(f"resolve/{COMMIT}" in path for _, path in hub.log if "resolve" in path)


def test_finished_folder_of_an_earlier_version_is_prepared(hub, tmp_path):
    """A manifest without a split means train, and nothing is downloaded again."""
    source, out = DatasetSource("o/n", subset="sample-10BT"), tmp_path / "out"
    manifest = prepare_module.prepare(source, out, name="t", val_fraction=0.2)
    del manifest.source["split"], manifest.source["parse_eos"]
    manifest.write(out / "manifest.json")
    hub.log.clear()
    lines = []
    source = DatasetSource("o/n", subset="sample-10BT")
    assert prepare_module.prepare(source, out, name="t", val_fraction=0.2, log=lines.append) == manifest
    assert "is already prepared" in lines[0] and hub.log == []
    with pytest.raises(DataError, match="already exists with split 'train', got 'test'"):
        prepare_module.prepare(DatasetSource("o/n", subset="sample-10BT", split="test"), out, name="t")
