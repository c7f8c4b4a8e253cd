import contextlib
import errno
import gzip
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pytest
from filelock import FileLock
from pyarrow import parquet

from data import DataError, shards
from data import prepare as prepare_module
from data.manifest import open_split, read_manifest
from data.prepare import merge, prepare
from data.sources import FileSource
from data.tokenizer import EOT, load_tiktoken

ROOT = Path(__file__).parents[2]
DOCUMENTS = [f"Document {i}. " + "Some words of it, again and again. " * (i % 7) for i in range(200)]


def jsonl(path, documents):
    path.write_text("".join(f"{json.dumps(text)}\n" for text in documents))
    return path


@pytest.fixture
def run(tmp_path):
    """run(name, documents, **options) prepares documents into tmp_path / name."""

    def run(name="out", documents=DOCUMENTS, files=1, **options):
        folder = tmp_path / "text"
        folder.mkdir(exist_ok=True)
        size = -(-len(documents) // files)
        for number in range(files):
            jsonl(folder / f"{number}.jsonl", documents[number * size : (number + 1) * size])
        options = {"val_fraction": 0.1, **options}
        return prepare(FileSource([folder]), tmp_path / name, name="t", **options)

    return run


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr("data.plan.PART_BYTES", 1)


def content_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def documents_of(folder, split):
    encoding = load_tiktoken()
    texts = []
    for shard in open_split(folder, split):
        tokens = shard[:].tolist()
        assert tokens[0] == EOT  # a shard begins with a document
        starts = [i for i, token in enumerate(tokens) if token == EOT] + [len(tokens)]
        texts += [encoding.decode(tokens[a + 1 : b]) for a, b in itertools.pairwise(starts)]
    return texts


def test_shards_have_every_document_once_and_in_order(run, tmp_path):
    manifest = run(shard_tokens=500)
    train, val = (documents_of(tmp_path / "out", split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(DOCUMENTS)
    assert train == [text for text in DOCUMENTS if text in set(train)]
    assert 5 < len(val) < 40
    assert manifest == read_manifest(tmp_path / "out")
    listed = {entry["file"] for entry in manifest.shards}
    assert {p.name for p in (tmp_path / "out").iterdir()} == listed | {"manifest.json"}
    assert {"t_train_00000000.bin", "t_train_00000001.bin", "t_val_00000000.bin"} <= listed
    for entry in manifest.shards:
        path = tmp_path / "out" / entry["file"]
        assert len(shards.open_shard(path)) == entry["tokens"] <= 500
        assert entry["documents"] == shards.open_shard(path)[:].tolist().count(EOT)
        done = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=False)
        assert done.returncode or done.stdout.split()[0] == entry["sha256"]
    assert manifest.total("train", "documents") == len(train)


def test_document_longer_than_a_shard_gets_its_own(run, tmp_path):
    long = "many words " * 300
    manifest = run(documents=[*DOCUMENTS[:50], long, *DOCUMENTS[50:]], shard_tokens=200)
    assert sum(entry["tokens"] > 200 for entry in manifest.shards) == 1
    assert next(entry for entry in manifest.shards if entry["tokens"] > 200)["documents"] == 1


def test_bytes_do_not_depend_on_the_number_of_processes(run, tmp_path, monkeypatch):
    monkeypatch.setattr("data.encode._BATCH_BYTES", 1000)
    run("one", shard_tokens=700)
    run("two", shard_tokens=700, num_proc=2)
    assert content_of(tmp_path / "one") == content_of(tmp_path / "two")


def test_tokenizer_backends_write_the_same_shards(run, tmp_path):
    pytest.importorskip("gigatoken")
    for backend in ("tiktoken", "gigatoken"):
        run(backend, tokenizer_backend=backend)
    assert [e["sha256"] for e in read_manifest(tmp_path / "tiktoken").shards] == [
        e["sha256"] for e in read_manifest(tmp_path / "gigatoken").shards
    ]


def test_duplicates_are_in_one_split(run, small_parts, tmp_path):
    run(documents=DOCUMENTS * 3, files=7, val_fraction=0.3)  # in other files, too
    train, val = (documents_of(tmp_path / "out", split) for split in ("train", "val"))
    assert not set(train) & set(val)
    assert len(train) + len(val) == 3 * len(DOCUMENTS)


def test_special_tokens_and_half_surrogates_are_plain_text(run, tmp_path):
    odd = [*DOCUMENTS, "a <|endoftext|> b", "half \ud800 pair"]
    run(documents=odd)
    tokens = [t for split in ("train", "val") for s in open_split(tmp_path / "out", split) for t in s[:].tolist()]
    assert tokens.count(EOT) == len(odd)
    assert "half \ufffd pair" in documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "val")


@pytest.mark.parametrize("files", [1, 5])
def test_max_tokens_ends_at_a_document(run, small_parts, tmp_path, files):
    everything = run("all", files=files, val_fraction=0.2)
    total = everything.total("train", "tokens") + everything.total("val", "tokens")
    manifest = run("some", files=files, max_tokens=total // 2, val_fraction=0.2)
    tokens = manifest.total("train", "tokens") + manifest.total("val", "tokens")
    assert total // 2 - 60 < tokens <= total // 2
    documents = {split: documents_of(tmp_path / "some", split) for split in ("train", "val")}
    first = set(DOCUMENTS[: len(documents["train"]) + len(documents["val"])])
    assert set(documents["train"]) | set(documents["val"]) == first


def test_errors_leave_no_files(run, tmp_path):
    cases = [
        ({"documents": DOCUMENTS[:1]}, "split has no documents"),
        ({"val_fraction": 0}, "val_fraction"),
        ({"num_proc": 0}, "num_proc"),
        ({"shard_tokens": 2**31}, "shard_tokens"),
        ({"shard_index": 2, "shard_count": 2}, "shard_index"),
        ({"max_tokens": 10, "shard_count": 2}, "max_tokens"),
        ({"tokenizer_backend": "steam"}, "tokenizer_backend must be one of .*, got 'steam'"),
    ]
    for options, words in cases:
        with pytest.raises(DataError, match=words):
            run(**options)
        assert {p.name for p in tmp_path.iterdir()} == {"text"}


def test_broken_file_keeps_finished_parts(run, small_parts, tmp_path):
    run("uninterrupted", files=4)
    whole = (tmp_path / "text" / "2.jsonl").read_bytes()
    broken = whole[:-20] + b"\xff" + whole[-20:]
    (tmp_path / "text" / "2.jsonl").write_bytes(broken)
    source = FileSource([tmp_path / "text"])
    with pytest.raises(DataError, match=r"2\.jsonl:50: not UTF-8"):
        prepare(source, tmp_path / "out", name="t", val_fraction=0.1)
    assert "2 of 4 parts are kept" in prepare_module.kept_parts(tmp_path / "out")
    record = tmp_path / "out" / "parts" / "00001.json"
    intact = record.read_text()
    record.write_text(intact.replace('"train"', '"val"'))
    with pytest.raises(DataError, match=r"00001\.json is damaged.*remove it, and its part is made again"):
        prepare(source, tmp_path / "out", name="t", val_fraction=0.1)
    record.write_text(intact)
    with pytest.raises(DataError, match="not finished"):
        open_split(tmp_path / "out", "train")
    (tmp_path / "text" / "2.jsonl").write_bytes(whole)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.bin")}
    prepare(source, tmp_path / "out", name="t", val_fraction=0.1)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.bin")}
    assert before
    assert before.items() <= after.items()  # not made again
    assert content_of(tmp_path / "out") == content_of(tmp_path / "uninterrupted")


def test_finished_folder_is_not_changed(run, tmp_path):
    manifest = run()
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    lines = []
    assert run(log=lines.append) == manifest
    assert "nothing to do" in lines[0]
    with pytest.raises(DataError, match=r"val_fraction 0\.1, got 0\.2"):
        run(val_fraction=0.2)
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}


def test_interrupted_cleanup_is_completed(run, small_parts, tmp_path, monkeypatch):
    run("uninterrupted", files=3)

    def killed(self, missing_ok=False):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", killed)  # the first call after the manifest is written
    with pytest.raises(KeyboardInterrupt):
        run(files=3)
    monkeypatch.undo()
    assert (tmp_path / "out" / "manifest.json").exists()
    assert (tmp_path / "out" / "parts").exists()
    monkeypatch.setattr("data.plan.PART_BYTES", 1)
    run(files=3)
    assert content_of(tmp_path / "out") == content_of(tmp_path / "uninterrupted")


def test_out_with_other_content_is_refused(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "text.txt").write_text("x")
    with pytest.raises(DataError, match="has other content"):
        run("full")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file"):
        run("file")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is a broken link"):
        run("link")
    assert {p.name for p in (tmp_path / "full").iterdir()} == {"text.txt"}


def test_resume_refuses_changed_files_and_settings(run, small_parts, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "finish", lambda out: None)  # stop just before the end
    run(files=3)
    monkeypatch.undo()
    with pytest.raises(DataError, match="was started with shard_tokens"):
        run(files=3, shard_tokens=999)
    with pytest.raises(DataError, match=r"2\.jsonl has changed since its part"):
        run(files=3, documents=[*DOCUMENTS[:-1], "another last one"])
    with pytest.raises(DataError, match="other files"):
        run(files=4)


def test_full_disk_is_an_error(run, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "_finish_shard", full)
    with pytest.raises(DataError, match="no space for"):
        run()
    assert not (tmp_path / "out").exists()


def test_disk_space_is_checked_before_the_work(run, tmp_path, monkeypatch):
    usage = prepare_module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(prepare_module.shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(DataError, match=r"needs about .* GB .* free; free some space"):
        run()


@pytest.mark.parametrize("count", [2, 3, 8])
def test_machines_divide_the_parts(run, small_parts, tmp_path, count):
    """Into separate folders, then merged; and all into one folder."""
    run("alone", files=5, shard_tokens=300)
    folders = []
    for index in range(count):
        folders.append(tmp_path / f"machine{index}")
        run(f"machine{index}", files=5, shard_tokens=300, shard_index=index, shard_count=count)
        last = run("shared", files=5, shard_tokens=300, shard_index=index, shard_count=count)
        assert (last is None) == (index < min(count, 5) - 1)
    merge(folders, tmp_path / "merged")
    assert content_of(tmp_path / "alone") == content_of(tmp_path / "shared") == content_of(tmp_path / "merged")


def test_merge_refuses_other_damaged_or_missing_parts(run, small_parts, tmp_path):
    run("a", files=5, shard_index=0, shard_count=2)
    run("b", files=5, shard_index=1, shard_count=2)
    run("c", files=5, shard_index=1, shard_count=2, val_fraction=0.3)
    with pytest.raises(DataError, match="not parts of the same"):
        merge([tmp_path / "a", tmp_path / "c"], tmp_path / "m")
    with pytest.raises(DataError, match=r"2 are missing: 1, 3"):
        merge([tmp_path / "a"], tmp_path / "m")
    with pytest.raises(DataError, match="no parts"):
        merge([tmp_path / "text"], tmp_path / "m2")
    shard = next((tmp_path / "b").glob("*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2] + b"\1\1")
    with pytest.raises(DataError, match="damaged"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")


def test_part_in_preparation_is_locked(run, small_parts, tmp_path):
    lock = FileLock(lock_of_part(tmp_path / "out", 0))
    with lock, pytest.raises(DataError, match="another process is preparing part 0"):
        run(files=3)


def lock_of_part(out, part):
    (out / "parts").mkdir(parents=True)
    (out / ".lock").touch()
    path = out / "parts" / f"{part:05d}.lock"
    # A started preparation, since a folder with other content is refused.
    source = FileSource([out.parent / "text"])
    (out.parent / "text").mkdir()
    for number in range(3):
        size = -(-len(DOCUMENTS) // 3)
        jsonl(out.parent / "text" / f"{number}.jsonl", DOCUMENTS[number * size : (number + 1) * size])
    (out / "parts").rmdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "_check_disk", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, out, name="t", val_fraction=0.1)
    (out / "parts").mkdir()
    return path


def interrupt(*args):
    raise KeyboardInterrupt


def command(*arguments):
    return [sys.executable, "-m", "data.prepare", *map(str, arguments)]


def test_command_prepares_files_and_reports_errors(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(DOCUMENTS))
    done = subprocess.run(
        command("files", tmp_path / "text.txt", "--out", tmp_path / "o", "--separator", r"\n\n", "--val_fraction", 0.1),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for words in ("GB needed", "documents/s", "tokens/s", "train ", "val "):
        assert words in done.stdout
    assert done.stderr == ""
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


def test_engine_is_an_alias_of_tokenizer_backend(tmp_path, capsys, monkeypatch):
    jsonl(tmp_path / "text.jsonl", DOCUMENTS)
    backends = []
    monkeypatch.setattr(prepare_module, "prepare", lambda *args, **options: backends.append(options) or exit_early())
    for flag in ("--engine", "--tokenizer_backend"):
        arguments = ["files", str(tmp_path / "text.jsonl"), "--out", str(tmp_path / "out"), flag, "gigatoken"]
        assert prepare_module.main(arguments) == 2
        lines = capsys.readouterr().err.splitlines()
        assert [line for line in lines if "--tokenizer_backend" in line] == (
            ["--engine is now called --tokenizer_backend"] if flag == "--engine" else []
        )
    assert [options["tokenizer_backend"] for options in backends] == ["gigatoken", "gigatoken"]


def exit_early():
    raise DataError("stopped by the test")


# Run by the tests below: parts of one file each, small batches, and Ctrl-C as in a terminal even if the tests
# run in the background.
PROGRAM = """
if __name__ == "__main__":
    import signal, sys
    from data import encode, plan, prepare
    signal.signal(signal.SIGINT, signal.default_int_handler)
    plan.PART_BYTES, encode._BATCH_BYTES = 1, 20_000
    code = prepare.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """Return a folder of 8 files of 4 MB, and the folder that an uninterrupted preparation makes of them."""
    from data.sources import sample_documents

    folder = tmp_path_factory.mktemp("big")
    documents = list(itertools.islice(itertools.cycle(sample_documents()), 7200))
    for number in range(8):
        jsonl(folder / f"{number}.jsonl", [f"{number} {text}" for text in documents[number * 900 : number * 900 + 900]])
    start(folder, folder / "uninterrupted").communicate(timeout=120)
    # Renamed afterwards, since the name of --out is the prefix of the file names.
    (folder / "uninterrupted").rename(folder / "result")
    return folder, folder / "result"


def start(files, out):
    arguments = ["files", *sorted(files.glob("*.jsonl")), "--out", out, "--num_proc", 2, "--shard_tokens", 100_000]
    return subprocess.Popen(
        [sys.executable, "-c", f"{PROGRAM}    sys.exit(code)", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def workers_of(process):
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="kills processes and reads /proc")
@pytest.mark.parametrize("seed", range(3))
def test_random_kills_do_not_change_the_bytes(big, tmp_path, seed):
    files, result = big
    out, rng = tmp_path / "uninterrupted", random.Random(seed)
    kills = 0
    for _ in range(30):
        process = start(files, out)
        try:
            if kills < 6:
                goal = rng.randrange(0, 4) + len(list(out.glob("parts/*.json")))
                while process.poll() is None and len(list(out.glob("parts/*.json"))) < goal:
                    time.sleep(0.01)
                time.sleep(rng.uniform(0, 0.5))
                workers = workers_of(process)
                victim = rng.choice([process.pid, *workers])
                kills += process.poll() is None
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        if process.returncode == 0:
            break
        assert process.returncode in (2, -signal.SIGKILL), errors
        assert "Traceback" not in errors
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_running(pid) for pid in workers)
    assert kills >= 1
    assert content_of(out) == content_of(result)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_interrupt_exits_with_130_and_names_the_kept_parts(big, tmp_path):
    process = start(big[0], tmp_path / "out")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list((tmp_path / "out").glob("parts/*.json")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "parts are kept in" in errors
    assert errors.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["txt", "jsonl.gz", "parquet"])
def test_memory_does_not_grow_with_the_input(tmp_path, kind):
    """Compare the peak for 200 MB of text with that for 20 MB; Arrow alone has buffers of up to 130 MB."""
    pytest.importorskip("gigatoken")
    program = PROGRAM + (
        "    peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "    print(int(peak.split()[1]) // 1024, file=sys.stderr)\n"
    )
    peaks = []
    for documents in (300, 3000):
        text = "".join(f"word{i % 9973} " for i in range(7_000))
        texts = [f"{number} {text}" for number in range(documents)]
        path = tmp_path / f"{documents}.{kind}"
        if kind == "txt":
            path.write_text("\n--\n".join(texts))
        elif kind == "parquet":
            parquet.write_table(pyarrow.table({"text": texts}), path, use_dictionary=False)  # one row group
        else:
            with gzip.open(path, "wt", compresslevel=1) as file:
                file.writelines(f"{json.dumps(text)}\n" for text in texts)
        del texts
        arguments = ["files", path, "--out", tmp_path / f"{documents}", "--separator", "\n--\n"]
        arguments += [
            "--val_fraction",
            0.1,
            "--num_proc",
            1,
            "--tokenizer_backend",
            "gigatoken",
            "--shard_tokens",
            2_000_000,
        ]
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stderr))
    assert peaks[1] < peaks[0] + (150 if kind == "parquet" else 50), peaks
    assert peaks[1] < 450
