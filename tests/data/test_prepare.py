"""`prepare`: the documents and bytes of the shards, resuming, dividing and merging, errors, and the command."""

import errno
import itertools
import json
import subprocess

import pyarrow
import pytest
from pyarrow import parquet
from shard_folders import DOCUMENTS, content_of, jsonl_folder, times_of

from common.errors import UserError
from data import DataError, plan, shards, sources
from data import prepare as prepare_module
from data.manifest import open_split, read_manifest, write_json_with_checksum
from data.plan import kept_work
from data.prepare import prepare
from data.sources import FileSource
from data.tokenizer import EOT, load_tiktoken
from data.verify import verify


@pytest.fixture
def run(tmp_path):
    """run(name, documents, **options) prepares documents into tmp_path / name."""

    def run(name="out", documents=DOCUMENTS, files=1, **options):
        source = FileSource([jsonl_folder(tmp_path / "text", documents, files)])
        return prepare(source, tmp_path / name, name="t", **{"val_fraction": 0.1, **options})

    return run


def documents_of(folder, split):
    encoding = load_tiktoken()
    texts = []
    for shard in open_split(folder, split):
        tokens = shard[:].tolist()
        assert tokens[0] == EOT  # a shard begins with a document
        starts = [i for i, token in enumerate(tokens) if token == EOT] + [len(tokens)]
        texts += [encoding.decode(tokens[a + 1 : b]) for a, b in itertools.pairwise(starts)]
    return texts


@pytest.fixture
def small_tasks(monkeypatch):
    """One task for each input file."""
    monkeypatch.setattr(plan, "TASK_BYTES", 1)


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


def test_document_longer_than_a_shard_gets_its_own(run):
    manifest = run(documents=[*DOCUMENTS[:50], "many words " * 300, *DOCUMENTS[50:]], shard_tokens=200)
    assert [entry["documents"] for entry in manifest.shards if entry["tokens"] > 200] == [1]


def test_bytes_do_not_depend_on_the_number_of_processes(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "TASK_BYTES", 1000)
    monkeypatch.setattr(plan, "TASK_BYTES", 1000)
    assert len(run("one", shard_tokens=700).inputs) > 10
    run("two", shard_tokens=700, num_proc=2)
    assert content_of(tmp_path / "one") == content_of(tmp_path / "two")


def test_duplicates_are_in_one_split(run, small_tasks, tmp_path):
    run(documents=DOCUMENTS * 3, files=7, val_fraction=0.3)  # in other files, too
    train, val = (documents_of(tmp_path / "out", split) for split in ("train", "val"))
    assert not set(train) & set(val)
    assert len(train) + len(val) == 3 * len(DOCUMENTS)


def test_special_tokens_and_half_surrogates_are_plain_text(run, tmp_path):
    odd = [*DOCUMENTS, "a <|endoftext|> b", "half \ud800 pair"]
    manifest = run(documents=odd)
    assert manifest.total("train", "documents") + manifest.total("val", "documents") == len(odd)
    assert "half \ufffd pair" in documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "val")


@pytest.mark.parametrize("files", [1, 5])
def test_max_tokens_takes_the_first_tokens_of_the_text(run, small_tasks, tmp_path, files):
    everything = run("all", files=files, val_fraction=0.5)
    run("some", files=files, max_tokens=1000, val_fraction=0.5, num_proc=2)
    found = {name: [documents_of(tmp_path / name, split) for split in ("train", "val")] for name in ("all", "some")}
    kept = 0
    for whole, part in zip(found["all"], found["some"], strict=True):
        assert part[:-1] == whole[: len(part) - 1]
        assert whole[len(part) - 1].startswith(part[-1])  # the last document may be cut
        kept += len(part)
    manifest = read_manifest(tmp_path / "some")
    assert manifest.total("train", "tokens") + manifest.total("val", "tokens") == 1000
    assert 0 < kept < everything.total("train", "documents")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"documents": [" "]}, "split has no text"),
        ({"val_fraction": 0}, "val_fraction"),
        ({"num_proc": 0}, "num_proc"),
        ({"shard_tokens": 2**31}, "shard_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_errors_leave_no_files(run, tmp_path, options, words):
    with pytest.raises(DataError, match=words):
        run(**options)
    assert {p.name for p in tmp_path.iterdir()} == {"text"}


def test_broken_file_keeps_finished_tasks(run, small_tasks, tmp_path):
    run("uninterrupted", files=4)
    out, broken = tmp_path / "out", tmp_path / "text" / "2.jsonl"
    intact = broken.read_bytes()
    broken.write_bytes(intact[:-20] + b"\xff" + intact[-20:])

    def resume():
        return prepare(FileSource([tmp_path / "text"]), out, name="t", val_fraction=0.1)

    with pytest.raises(UserError, match=r"2\.jsonl:50: not UTF-8"):
        resume()
    assert "2 of 4 tasks are kept" in kept_work(out)
    record = out / "tasks" / "000001.json"
    intact_record, times = record.read_text(), times_of(out / "tasks")
    record.write_text(intact_record.replace('"tokens"', '"takens"'))
    with pytest.raises(DataError, match="not finished"):
        open_split(out, "train")
    broken.write_bytes(intact)
    with pytest.raises(DataError, match=r"000001\.json is damaged.*remove it, and its task is done again"):
        resume()
    record.write_text(intact_record)
    assert times["000000.bin"] == times_of(out / "tasks")["000000.bin"]  # not made again
    resume()
    assert content_of(out) == content_of(tmp_path / "uninterrupted")


def test_errors_replace_resumes_what_strict_began(run, small_tasks, tmp_path):
    jsonl_folder(tmp_path / "text", DOCUMENTS, 4)
    broken = tmp_path / "text" / "2.jsonl"
    broken.write_bytes(broken.read_bytes()[:-20] + b"\xff" + broken.read_bytes()[-20:])
    with pytest.raises(UserError, match=r"--errors replace.*2 of 4 tasks are kept"):
        prepare(FileSource([tmp_path / "text"]), tmp_path / "out", name="t")
    manifest = prepare(FileSource([tmp_path / "text"], errors="replace"), tmp_path / "out", name="t")
    assert manifest.source["errors"] == "replace"


def test_damaged_tokens_of_a_task_are_not_used(run, small_tasks, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(plan.Joiner, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(files=3)
    tokens = tmp_path / "out" / "tasks" / "000001.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2] + b"\1\1")
    with pytest.raises(DataError, match=r"000001\.bin is damaged; remove .*000001\.json"):
        run(files=3)


def test_finished_folder_is_not_changed(run, tmp_path):
    manifest = run()
    before = times_of(tmp_path / "out")
    lines = []
    assert run(log=lines.append) == manifest
    assert "is already prepared" in lines[0]
    with pytest.raises(DataError, match=r"val_fraction 0\.1, got 0\.2"):
        run(val_fraction=0.2)
    assert before == times_of(tmp_path / "out")


def test_interrupted_cleanup_is_completed(run, small_tasks, tmp_path):
    run("uninterrupted", files=3)
    for moment in ("data.plan.remove_plan", "data.plan.remove_task"):  # after the manifest, after a part's record
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(moment, interrupt)
            with pytest.raises(KeyboardInterrupt):
                run(moment, files=3)
        assert (tmp_path / moment / "tasks").exists()
        run(moment, files=3)
        assert content_of(tmp_path / moment) == content_of(tmp_path / "uninterrupted")


def interrupt(*arguments, **options):
    raise KeyboardInterrupt


def test_out_with_other_content_is_refused(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "text.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, words in (("full", "has other content"), ("file", "is a file"), ("link", "is a broken link")):
        with pytest.raises(DataError, match=words):
            run(name)
    assert {p.name for p in (tmp_path / "full").iterdir()} == {"text.txt"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shard_tokens": 999}, "was started with shard_tokens"),
        ({"documents": [*DOCUMENTS[:-1], "another last one"]}, r"2\.jsonl has changed since it was tokenized"),
        ({"files": 4}, "other files"),
    ],
)
def test_resume_refuses_changed_files_and_settings(run, small_tasks, monkeypatch, options, words):
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "finish", interrupt)  # stop just before the end
        with pytest.raises(KeyboardInterrupt):
            run(files=3)
    with pytest.raises(DataError, match=words):
        run(**{"files": 3, **options})


@pytest.mark.parametrize("source", [["files", "text.txt"], ["pretokenized", "shards"]])
def test_out_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, capsys, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some text")
    (tmp_path / "shards").mkdir()
    for split in ("train", "val"):
        shards.write_shard(tmp_path / "shards" / f"x_{split}_000000.bin", [EOT, 1])
    assert prepare_module.main([*source, "--out", "o" * 300]) == 2
    assert "was not made: [Errno 36] File name too long" in capsys.readouterr().err
    assert prepare_module.main([source[0], "s" * 300, "--out", "out"]) == 2
    assert "File name too long" in capsys.readouterr().err


@pytest.mark.parametrize("moment", ["pretokenized", "check"])
def test_interrupt_does_not_say_that_nothing_was_kept(run, tmp_path, monkeypatch, capsys, moment):
    """Downloads are kept, and so is a finished folder that is only being checked."""
    if moment == "check":
        run()
        monkeypatch.setattr(prepare_module, "verify", interrupt)
        source = ["files", str(tmp_path / "text"), "--val_fraction", "0.1"]
    else:
        monkeypatch.setattr(prepare_module, "import_shards", interrupt)
        source = ["pretokenized", "some/set"]
    assert prepare_module.main([*source, "--out", str(tmp_path / "out")]) == 130
    assert "interrupted: run the same command to resume" in capsys.readouterr().err


def test_full_disk_is_an_error(run, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_finish_shard", full)
        with pytest.raises(DataError, match="no space for"):
            run()
    assert "1 of 1 tasks are kept" in kept_work(tmp_path / "out")
    run()


def test_disk_space_is_checked_before_the_work(run, tmp_path, monkeypatch):
    usage = shards.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(DataError, match=r"needs about .* GB free; free some space"):
        run()


def test_disk_space_of_finished_tasks_is_not_needed_again(run, small_tasks, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(plan.Joiner, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(files=3)
    usage = shards.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: usage._replace(free=10))
    run(files=3)


def test_folder_in_preparation_is_locked(run, small_tasks, monkeypatch):
    monkeypatch.setattr(plan.Joiner, "finish", lambda self: run(files=3))  # a second one during the first
    with pytest.raises(DataError, match="another process is preparing"):
        run(files=3)


def test_second_of_two_starts_does_not_remove_the_folder(run, tmp_path, monkeypatch):
    def lock(out):
        (out / "of_the_first").touch()
        raise DataError("another process is preparing it")

    monkeypatch.setattr(prepare_module, "folder_lock", lock)
    with pytest.raises(DataError, match="another process"):
        run()
    assert (tmp_path / "out" / "of_the_first").exists()


@pytest.mark.parametrize(
    "arguments", ["merge a b --out c", "files a --shard_index 1 --out c", "fineweb --keep_parquet"]
)
def test_removed_options_name_the_new_way(arguments, capsys):
    assert prepare_module.main(arguments.split()) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_command_prepares_files(run_command, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(DOCUMENTS))
    done = run_command("files", tmp_path / "text.txt", "--separator", r"\n\n", "--val_fraction", 0.1)
    assert done.returncode == 0, done.stderr
    for words in ("GB needed", "tokens/s", "train ", "val "):
        assert words in done.stdout
    assert done.stderr == ""
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]["kind"] == "files"
    assert len(documents_of(tmp_path / "out", "train")) > 100


def test_command_reports_a_bad_file_on_one_line(tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text("{\n")
    assert prepare_module.main(["files", str(tmp_path / "bad.jsonl"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'bad.jsonl'}:1: not JSON")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--engine", "--tokenizer_backend"])
def test_engine_is_an_alias_of_tokenizer_backend(tmp_path, monkeypatch, flag):
    backends = []
    monkeypatch.setattr(
        prepare_module, "prepare", lambda *_, tokenizer, **__: backends.append(tokenizer.backend) or interrupt()
    )
    assert prepare_module.main(["files", "text.txt", "--out", str(tmp_path / "out"), flag, "gigatoken"]) == 130
    assert backends == ["gigatoken"]


def test_one_document_is_cut_by_tokens(run, tmp_path):
    """The last tenth of its tokens is for validation; an interruption just before the end loses nothing."""
    text = "A book in one piece. " * 2000
    tokens = [EOT, *load_tiktoken().encode_ordinary(text)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(documents=[text])
    lines = []
    manifest = run(documents=[text], log=lines.append)
    train, val = ([t for s in open_split(tmp_path / "out", split) for t in s[:].tolist()] for split in ("train", "val"))
    assert train + val == tokens
    assert len(val) == -(-len(tokens) // 10)
    assert any(f"the last {len(val):,} of {len(tokens):,} tokens" in line for line in lines)
    before = content_of(tmp_path / "out")
    (tmp_path / "out" / manifest.shards[0]["file"]).unlink()
    run(documents=[text])
    assert content_of(tmp_path / "out") == before
    assert verify(tmp_path / "out")[1] == {}


def test_cut_takes_the_end_of_several_shards(run, tmp_path):
    documents = ["x y z " * 300] * 8  # duplicates, which are all drawn for the same split
    run("whole", documents=documents, val_fraction=0.001, shard_tokens=10**6)
    run("parts", documents=documents, val_fraction=0.4, shard_tokens=1000)  # 0.4: more than a tenth
    whole, parts = (
        {split: [t for s in open_split(tmp_path / name, split) for t in s[:].tolist()] for split in ("train", "val")}
        for name in ("whole", "parts")
    )
    assert whole["train"] + whole["val"] == parts["train"] + parts["val"]
    assert len(parts["val"]) == -(-4 * len(parts["train"] + parts["val"]) // 10)


def test_end_of_text_in_a_text_is_counted_and_can_be_parsed(run, tmp_path):
    odd = [*DOCUMENTS, "one<|endoftext|>two<|endoftext|>\n"]
    lines = []
    run(documents=odd, log=lines.append)
    assert any("<|endoftext|> is in the text 2 times" in line and "--parse_eos" in line for line in lines)
    run("parsed", documents=odd, parse_eos=True)
    parsed = documents_of(tmp_path / "parsed", "train") + documents_of(tmp_path / "parsed", "val")
    assert {"one", "two"} <= set(parsed)
    with pytest.raises(DataError, match="already exists with parse_eos True, got None"):
        run("parsed", documents=odd)


def test_null_rows_and_files_of_other_kinds_are_reported(tmp_path):
    folder = jsonl_folder(tmp_path / "text", DOCUMENTS, 1)
    (folder / "null.jsonl").write_text('{"text": null}\n{"text": "some"}\n')
    parquet.write_table(pyarrow.table({"text": ["word", None, None]}), folder / "A.PARQUET")
    (folder / "B.TXT").write_text("read, whatever its case")
    (folder / "notes.pdf").write_text("x")
    lines = []
    prepare(FileSource([folder]), tmp_path / "out", name="t", val_fraction=0.1, log=lines.append)
    assert "skipped   3 rows without a text (null)" in lines
    assert f"skipped   1 files of other kinds: {folder / 'notes.pdf'}" in lines
    found = documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "val")
    assert {"some", "word", "read, whatever its case"} <= set(found)


def test_named_corpora_are_hub_data_sets(tmp_path, monkeypatch):
    calls = []

    def fake(source, *_, **options):
        calls.append((source, options))
        interrupt()

    monkeypatch.setattr(prepare_module, "prepare", fake)
    for name, corpus in prepare_module.CORPORA.items():
        assert prepare_module.main([name, "--out", str(tmp_path / "out"), "--revision", "v1"]) == 130
        source, options = calls.pop()
        assert (source.dataset, source.subset, source.revision) == (corpus.dataset, corpus.subset, "v1")
        assert options["max_tokens"] == corpus.max_tokens


def test_preparation_that_an_earlier_version_began_is_refused(run, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run()
    started = read_manifest(tmp_path / "out", "preparing.json")
    started.inputs = [{"path": "0.jsonl", "bytes": 3, "part": 0}]
    started.write(tmp_path / "out" / "preparing.json")
    write_json_with_checksum(tmp_path / "out" / "parts" / "00000.json", {"part": 0, "shards": [], "is_full": False})
    arguments = ["files", str(tmp_path / "text"), "--out", str(tmp_path / "out"), "--val_fraction", "0.1"]
    assert prepare_module.main(arguments) == 2
    assert "an earlier version began" in capsys.readouterr().err
