import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data import DataError
from data import prepare as prepare_module
from data.prepare import prepare
from data.shards import open_shard, open_split, read_manifest
from data.tokenizer import EOT, load_tiktoken

ROOT = Path(__file__).parents[2]
DOCUMENTS = [f"Document {i}. " + "Some words of it, again and again. " * (i % 7) for i in range(200)]


def run(out, documents=DOCUMENTS, **options):
    options = {"name": "t", "source": {"kind": "test"}, "val_fraction": 0.1, **options}
    return prepare(documents, out, **options)


def documents_of(folder, split):
    encoding = load_tiktoken()
    texts = []
    for shard in open_split(folder, split):
        tokens = shard.tolist()
        assert tokens[0] == EOT  # a shard begins with a document
        starts = [i for i, token in enumerate(tokens) if token == EOT] + [len(tokens)]
        texts += [encoding.decode(tokens[a + 1 : b]) for a, b in itertools.pairwise(starts)]
    return texts


def test_every_document_arrives_whole_in_order_and_once(tmp_path):
    manifest = run(tmp_path / "out", shard_tokens=500)
    train, val = (documents_of(tmp_path / "out", split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(DOCUMENTS)
    assert train == [text for text in DOCUMENTS if text in set(train)]
    assert 5 < len(val) < 40
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names[0] == "manifest.json"
    assert names[1] == "t_train_000001.bin"
    assert "t_val_000000.bin" in names
    assert manifest == read_manifest(tmp_path / "out")
    for entry in manifest.shards:
        path = tmp_path / "out" / entry["file"]
        assert len(open_shard(path)) == entry["tokens"] <= 500
        done = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=False)
        assert done.returncode or done.stdout.split()[0] == entry["sha256"]


def test_the_same_bytes_for_any_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "_BATCH_CHARACTERS", 1000)
    run(tmp_path / "one", shard_tokens=700)
    run(tmp_path / "two", shard_tokens=700, num_proc=2)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two


def test_duplicates_never_stand_on_both_sides(tmp_path):
    run(tmp_path / "out", DOCUMENTS * 2, val_fraction=0.3)
    train, val = (documents_of(tmp_path / "out", split) for split in ("train", "val"))
    assert not set(train) & set(val)
    assert len(train) + len(val) == 2 * len(DOCUMENTS)


def test_special_tokens_in_text_and_half_surrogates_are_plain_text(tmp_path):
    odd = [*DOCUMENTS, "a <|endoftext|> b", "half \ud800 pair"]
    run(tmp_path / "out", odd)
    tokens = [t for split in ("train", "val") for shard in open_split(tmp_path / "out", split) for t in shard.tolist()]
    assert tokens.count(EOT) == len(odd)
    assert "half \ufffd pair" in documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "val")


def test_errors_leave_nothing_behind(tmp_path):
    def source():
        yield from DOCUMENTS[:50]
        raise DataError("line 51 is broken")

    cases = [
        ({"documents": source()}, "line 51"),
        ({"documents": DOCUMENTS[:1]}, "no document fell into"),
        ({"val_fraction": 0}, "val_fraction"),
        ({"num_proc": 0}, "num_proc"),
    ]
    for options, words in cases:
        with pytest.raises(DataError, match=words):
            run(tmp_path / "out", **options)
        assert not list(tmp_path.iterdir())


def test_a_finished_folder_is_left_alone(tmp_path):
    run(tmp_path / "out")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    with pytest.raises(DataError, match="there already"):
        run(tmp_path / "out", DOCUMENTS[:100])
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare_module, "write_shard", full)
    with pytest.raises(DataError, match="no room"):
        run(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def command(*arguments):
    return [sys.executable, "-m", "data.prepare", *map(str, arguments)]


def test_the_command(tmp_path):
    (tmp_path / "mine.txt").write_text("\n\n".join(DOCUMENTS))
    done = subprocess.run(
        command("files", tmp_path / "mine.txt", "--out", tmp_path / "o", "--separator", r"\n\n", "--val_fraction", 0.1),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "documents" in done.stdout
    assert json.loads((tmp_path / "o" / "manifest.json").read_text())["source"]["kind"] == "files"
    assert len(documents_of(tmp_path / "o", "train")) > 100

    (tmp_path / "bad.jsonl").write_text("{\n")
    done = subprocess.run(
        command("files", tmp_path / "bad.jsonl", "--out", tmp_path / "p"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'bad.jsonl'}:1: not JSON")
    assert not (tmp_path / "p").exists()


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_killed_worker_and_an_interrupt_end_it(tmp_path):
    """A source that never ends; first a worker is killed, then Ctrl-C is pressed."""
    program = (
        "import itertools, signal, sys; from data import prepare as p; "
        # A shell's background job, as CI may be one, starts with Ctrl-C ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "p.sample_documents = lambda: itertools.repeat('some words ' * 2000); "
        "p.main(['sample', '--num_proc', '2', '--out', sys.argv[1]])"
    )
    for victim in ("worker", "parent"):
        out = tmp_path / victim
        process = subprocess.Popen(
            [sys.executable, "-c", f"if __name__ == '__main__':\n    {program}", out],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 60
        children = []
        while time.monotonic() < deadline and len(children) < 3:  # two workers and the resource tracker
            time.sleep(0.2)
            found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
            children = [int(pid) for pid in found.stdout.split()]
        time.sleep(1)
        if victim == "worker":
            os.kill(max(children), signal.SIGKILL)
        else:
            process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == (1 if victim == "worker" else 130), errors
        assert ("was killed" if victim == "worker" else "interrupted: nothing was kept") in errors
        assert not list(tmp_path.iterdir())
