"""`train.py --text`: which folder a text gets, and when it is prepared."""

import os

import pytest

from data import DataError, text_cache
from data.manifest import read_manifest
from data.text_cache import prepare_text


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """An empty working folder, and a list of the folders that were prepared in it."""
    folders = []

    def prepare(source, out, **options):
        folders.append(str(out))
        out.mkdir()
        (out / "manifest.json").touch()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(text_cache, "prepare", prepare)
    return folders


def test_a_text_is_prepared_once(prepared, tmp_path):
    (tmp_path / "book.txt").write_text("one\n")
    assert prepare_text("book.txt", is_dry_run=True).startswith("shards/book-")
    assert not (tmp_path / "shards").exists()
    first = prepare_text("book.txt")
    assert prepare_text(str(tmp_path / "book.txt")) == prepare_text("./book.txt") == first
    assert prepared == [first]
    (tmp_path / "book.txt").write_text("two\n")
    second = prepare_text("book.txt")
    assert prepared == [first, second] and first != second
    os.utime(tmp_path / "book.txt", (0, 0))
    assert prepare_text("book.txt") == second


def test_folders_and_patterns(prepared, tmp_path):
    for name in ("texts/a.txt", "texts/more/b.jsonl", "texts/c.html"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(f'"{name}"')
    first = prepare_text("texts")
    assert prepare_text("texts/") == first
    assert prepare_text("texts/**/*.[tj]*").startswith("shards/texts-tj-")
    (tmp_path / "texts").rename(tmp_path / "moved")
    assert prepare_text("moved").partition("-")[2] == first.partition("-")[2]
    (tmp_path / "moved" / "a.txt").rename(tmp_path / "moved" / "z.txt")  # another order
    assert prepare_text("moved").partition("-")[2] != first.partition("-")[2]
    assert len(prepared) == 4


def test_patterns_in_a_folder_whose_name_looks_like_one(prepared, tmp_path, monkeypatch):
    (tmp_path / "my [data]").mkdir()
    (tmp_path / "my [data]" / "a.txt").write_text("one\n")
    monkeypatch.chdir(tmp_path / "my [data]")
    assert prepare_text("*.txt").startswith("shards/txt-")
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        prepare_text("a" * 300)


def test_large_texts_are_known_by_sizes_and_times(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(text_cache, "_HASHED_BYTES", 3)
    (tmp_path / "book.txt").write_text("one\n")
    first = prepare_text("book.txt")
    assert prepare_text("book.txt") == first
    os.utime(tmp_path / "book.txt", (0, 0))
    assert prepare_text("book.txt") != first


def test_a_data_set_is_known_by_its_commit(prepared, monkeypatch):
    monkeypatch.setattr(text_cache, "find_commit", lambda *_: "abc")
    first = prepare_text("owner/a.b")
    assert first.startswith("shards/owner-a-b-") and prepare_text("owner/a.b") == first
    monkeypatch.setattr(text_cache, "find_commit", lambda *_: "def")
    assert prepare_text("owner/a.b") != first

    def offline(*_):
        raise DataError("no network")

    monkeypatch.setattr(text_cache, "find_commit", offline)
    with pytest.raises(DataError, match=f"no network; prepared earlier: .*--data.path.*{first}"):
        prepare_text("owner/a.b")


def test_a_folder_of_shards_is_not_a_text(prepared, tmp_path):
    (tmp_path / "book.txt").write_text("one\n")
    folder = prepare_text("book.txt")
    with pytest.raises(DataError, match=f"give it as --data.path {folder}"):
        prepare_text(folder)


def test_a_text_that_was_moved_after_an_interruption_starts_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(text_cache, "available_cores", lambda: 1)
    (tmp_path / "book.txt").write_text("Some words.\n" * 1000)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("data.prepare.finish", interrupt)
        prepare_text("book.txt")
    (tmp_path / "moved").mkdir()
    (tmp_path / "book.txt").rename(tmp_path / "moved" / "book.txt")
    out = prepare_text("moved/book.txt")
    assert read_manifest(out).source["paths"] == [str(tmp_path / "moved" / "book.txt")]
