"""Data sets from a Hub on localhost, read with the real client, with and without faults."""

import io
import json

import pyarrow
import pytest
from hub_server import COMMIT
from huggingface_hub import constants
from pyarrow import parquet

from data import DataError
from data.hub import HubRepository, HubSource
from data.manifest import read_manifest
from data.prepare import prepare
from data.pretokenized import HubShards
from data.sources import FileSource

TEXTS = [f"Document {i}. " + "Some words of it, again and again. " * (i % 9) for i in range(240)]
FILES = 6
PREPARED = {"name": "out", "val_fraction": 0.1}


def parquet_file(texts):
    sink = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": texts, "id": list(range(len(texts)))}), sink, row_group_size=10)
    return sink.getvalue()


def shares(texts):
    size = len(texts) // FILES
    return [texts[i * size : (i + 1) * size] for i in range(FILES)]


FINEWEB = {
    **{f"sample/10BT/{i:03d}_00000.parquet": parquet_file(texts) for i, texts in enumerate(shares(TEXTS))},
    **{f"data/CC-MAIN-{i}/000.parquet": parquet_file(["never asked for"]) for i in range(3)},
    "README.md": b"---\n---\n",
}
CARD = {
    "configs": [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/*/*"}]},
        {"config_name": "sample-10BT", "data_files": [{"split": "train", "path": "sample/10BT/*"}]},
        {"config_name": "only-test", "data_files": [{"split": "test", "path": "data/*/*"}]},
        {"config_name": "plain", "data_files": "sample/10BT/000*"},
    ]
}
NAME = "datasets/HuggingFaceFW/fineweb-edu"


@pytest.fixture
def server(server):
    server.repos[NAME], server.cards[NAME] = FINEWEB, CARD
    return server


def source(tmp_path, *, dataset="HuggingFaceFW/fineweb-edu", revision="main", **options):
    repository = HubRepository(dataset, revision=revision, download_folder=tmp_path / "out" / "downloads")
    return HubSource(repository, **options)


def tokens_of(folder):
    return [(entry["file"], entry["sha256"]) for entry in read_manifest(folder).shards]


@pytest.fixture
def expected(tmp_path, small_parts):
    """The shards that the same documents give from local files."""
    (tmp_path / "local").mkdir()
    for number, texts in enumerate(shares(TEXTS)):
        (tmp_path / "local" / f"{number}.parquet").write_bytes(parquet_file(texts))
    prepare(FileSource([tmp_path / "local"]), tmp_path / "expected", **PREPARED)
    return tokens_of(tmp_path / "expected")


def test_subset_is_prepared_file_by_file(client, expected, tmp_path):
    manifest = prepare(source(tmp_path, subset="sample-10BT"), tmp_path / "out", **PREPARED)
    assert tokens_of(tmp_path / "out") == expected
    assert manifest.source["revision"] == COMMIT
    assert manifest.source["subset"] == "sample-10BT"
    assert [file["path"] for file in manifest.inputs] == sorted(path for path in FINEWEB if path.startswith("sample"))
    assert not (tmp_path / "out" / "downloads").exists()
    assert not any("CC-MAIN" in path for _, path in client.log)


def test_keep_leaves_the_parquet_files(client, tmp_path):
    tmp_path = tmp_path / ".cache"  # the folder's own name must not matter
    prepare(source(tmp_path, subset="sample-10BT", keep=True), tmp_path / "out", **PREPARED)
    for path, content in FINEWEB.items():
        if path.startswith("sample"):
            assert (tmp_path / "out" / "downloads" / path).read_bytes() == content


FAULTS = [429, 500, 503, "drop", "truncate", "corrupt"]


@pytest.mark.parametrize("fault", FAULTS)
def test_transient_faults_are_retried(client, expected, tmp_path, fault, capsys):
    """Every fault on every kind of request; the last file fails twice. 429 waits a second, and comes less often."""
    patterns = ["GET .*001_00000", "GET .*005_00000", "GET .*005_00000"]
    if isinstance(fault, int):
        patterns += ["revision", "tree", "HEAD .*002_00000"]
    if fault == 429:
        patterns = ["GET .*001_00000", "revision"]
    client.faults += [(pattern, fault) for pattern in patterns]
    prepare(source(tmp_path, subset="sample-10BT"), tmp_path / "out", **PREPARED)
    assert client.faults == []
    assert tokens_of(tmp_path / "out") == expected


def test_hanging_server_times_out_and_is_retried(client, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("data.hub._LISTING_SECONDS", 0.3)
    client.faults += [("revision", "hang"), ("tree", "hang")]
    prepare(source(tmp_path, subset="sample-10BT"), tmp_path / "out", **PREPARED)
    assert tokens_of(tmp_path / "out") == expected
    assert capsys.readouterr().err.count("no response in 0 seconds") == 2


def test_failed_download_keeps_finished_parts_and_resumes(client, expected, tmp_path, capsys):
    client.faults += [("GET .*003_00000", 500)] * 100
    with pytest.raises(DataError, match=r"003_00000\.parquet: request to .* failed after 6 attempts \(HTTP 500\)"):
        prepare(source(tmp_path, subset="sample-10BT"), tmp_path / "out", **PREPARED)
    assert "trying again" in capsys.readouterr().err
    client.faults.clear()
    client.log.clear()
    prepare(source(tmp_path, subset="sample-10BT"), tmp_path / "out", **PREPARED)
    assert tokens_of(tmp_path / "out") == expected
    assert not any(f"00{i}_00000" in path for i in range(3) for _, path in client.log)  # no download twice


def test_resume_uses_the_commit_of_the_first_lookup(client, expected, tmp_path, monkeypatch):
    client.faults += [("GET .*003_00000", 404)]
    with pytest.raises(DataError):
        prepare(source(tmp_path, subset="sample-10BT"), tmp_path / "out", **PREPARED)
    client.faults.clear()
    monkeypatch.setattr("hub_server.COMMIT", "d" * 40)  # a push in the meantime
    manifest = prepare(source(tmp_path, subset="sample-10BT"), tmp_path / "out", **PREPARED)
    assert manifest.source["revision"] == "c" * 40


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"subset": "sample-9T"}, r"no subset 'sample-9T'; it has default, sample-10BT"),
        ({"subset": "only-test"}, r"no split 'train', only test"),
        ({"dataset": "missing/missing"}, r"no data set missing/missing"),
        ({"revision": "v9"}, r"no revision 'v9'"),
        ({"dataset": "a b"}, r"not the name of a data set"),
        ({"subset": "sample-10BT", "text_column": "body"}, r"no column 'body', only \['text', 'id'\]"),
    ],
)
def test_missing_names_are_errors(client, tmp_path, options, words):
    with pytest.raises(DataError, match=words) as error:
        prepare(source(tmp_path, **options), tmp_path / "out", **PREPARED)
    assert "\n" not in str(error.value)


def test_missing_data_set_of_shards_is_named(client, tmp_path):
    """Listing the files is the first request."""
    repository = HubRepository("missing/missing", download_folder=tmp_path / "downloads")
    with pytest.raises(DataError, match=r"no data set missing/missing"):
        HubShards(repository).inputs()


def test_training_files_without_a_card(client, tmp_path):
    client.repos["datasets/a/b"] = {
        "train.jsonl": b'"one"\n' * 300,
        "test.jsonl": b'"two"\n',
        "README.md": b"x",
        "code.py": b"x",
    }
    client.repos["datasets/a/c"] = {"x/part-1.parquet": parquet_file(["a"]), "y/part-1.parquet": parquet_file(["b"])}
    client.repos["datasets/a/d"] = {"train.csv": b"x"}

    def inputs(**options):
        return [file["path"] for file in source(tmp_path, **options).inputs()]

    assert inputs(dataset="a/b") == ["train.jsonl"]
    assert inputs(dataset="a/c") == ["x/part-1.parquet", "y/part-1.parquet"]
    assert inputs(dataset="a/c", subset="y") == ["y/part-1.parquet"]
    with pytest.raises(DataError, match=r"no file of kind.*it has \.csv.*refs/convert/parquet"):
        inputs(dataset="a/d")
    assert inputs(subset="plain") == ["sample/10BT/000_00000.parquet"]


def test_max_tokens_downloads_no_more_than_it_needs(client, tmp_path):
    prepare(source(tmp_path, subset="sample-10BT"), tmp_path / "out", **PREPARED, max_tokens=2000)
    assert not any("003_00000" in path for _, path in client.log)


def test_command_prepares_a_subset(server, run_command, tmp_path):
    server.faults += [("GET .*002_00000", "drop"), ("GET .*004_00000", "truncate")]
    done = run_command("fineweb-edu", "--val_fraction", "0.1", "--num_proc", "2", HF_ENDPOINT=server.address)
    assert done.returncode == 0, done.stderr
    assert "240 documents" in done.stdout
    assert "Traceback" not in done.stderr
    source = json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]
    assert (source["dataset"], source["subset"]) == ("HuggingFaceFW/fineweb-edu", "sample-10BT")


def test_offline_mode_is_an_error_on_one_line(run_command, tmp_path):
    done = run_command("fineweb", HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "HF_HUB_OFFLINE is set" in done.stderr
    assert not (tmp_path / "out").exists()


def test_no_network_is_an_error(client, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"request to http://127\.0\.0\.1:9 failed after 6 attempts .*HF_ENDPOINT"):
        prepare(source(tmp_path), tmp_path / "out", **PREPARED)
    assert not (tmp_path / "out").exists()


def test_messages_never_contain_the_token(client, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "secret" * 6)
    client.faults += [("revision", 500), ("revision", 403)]
    with pytest.raises(DataError) as error:
        prepare(source(tmp_path), tmp_path / "out", **PREPARED)
    assert "secret" not in str(error.value) + capsys.readouterr().err
