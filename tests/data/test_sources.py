import gzip
import json
import lzma

import pyarrow
import pytest
from pyarrow import parquet

from common.errors import UserError
from data import DataError, sources
from data.sources import FileSource, docstrings, sample_documents
from data.tokenizer import load_tiktoken


def documents(paths, **options):
    """Return the texts of all files."""
    source = FileSource(paths, **options)
    return [document.text for task in source.tasks() for document in source.documents(task) if document.text]


def zstd(content, *, frames=1):
    sink = pyarrow.BufferOutputStream()
    step = -(-len(content) // frames)
    for start in range(0, len(content), step):
        part = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(part, "zstd") as stream:
            stream.write(content[start : start + step])
        sink.write(part.getvalue())
    return sink.getvalue().to_pybytes()


def test_sample_is_english_prose_and_deterministic(sample):
    assert sample == list(sample_documents())
    text = "\n".join(sample)
    assert 1_000_000 < len(text) < 5_000_000
    assert 'The "with" statement' in text  # the language reference
    assert "Return a list of" in text  # docstrings
    words = text.split()
    assert sum(word.lower() in ("the", "a", "is", "of", "to", "and") for word in words) > 0.1 * len(words)


def test_docstrings_are_in_order(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(
        '"""Module."""\nclass A:\n    """Class.\n\n    More.\n    """\n    def f(self):\n        """Method."""\n'
        'async def g():\n    """Function."""\nx = "not a docstring"\n'
    )
    assert docstrings(path) == "Module.\n\nClass.\n\nMore.\n\nMethod.\n\nFunction."
    path.write_text("def (:")
    assert docstrings(path) == ""


def test_documents_of_files_folders_and_patterns(tmp_path):
    (tmp_path / "b.txt").write_text("one\n---\ntwo\n---\n \n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jsonl").write_text('{"text": "three"}\n\n"four"\n{"text": ""}\n')
    (tmp_path / "ignored.md").write_text("no")
    assert documents([tmp_path / "b.txt"]) == ["one\n---\ntwo\n---\n \n"]
    assert documents([tmp_path], separator="\n---\n") == ["one", "two", "three", "four"]
    assert documents([tmp_path / "sub", tmp_path / "b.txt"])[:2] == ["three", "four"]
    (tmp_path / "k.jsonl").write_text('{"body": "five"}\n')
    assert documents([tmp_path / "k.jsonl"], text_column="body") == ["five"]
    (tmp_path / "[odd] name.txt").write_text("six")
    assert documents([tmp_path / "[odd] name.txt"]) == ["six"]  # an existing name is not a pattern
    assert documents([f"{tmp_path}/**/a.*"]) == ["three", "four"]


TEXTS = ["first", "zweiter: Grüße", "third\nwith lines", "x" * 3_000_000, "last"]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        ("", bytes),
        (".gz", gzip.compress),
        (".xz", lzma.compress),
        (".zst", zstd),
        (".zst", lambda content: zstd(content, frames=5)),  # as written by parallel compressors
    ],
)
def test_compressed_files_have_the_same_documents(tmp_path, suffix, compress):
    lines = "".join(f"{json.dumps({'text': text})}\n" for text in TEXTS)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(lines.encode()))
    assert documents([tmp_path / f"a.jsonl{suffix}"]) == TEXTS
    (tmp_path / f"b.txt{suffix}").write_bytes(compress("<|sep|>".join(TEXTS).encode()))
    assert documents([tmp_path / f"b.txt{suffix}"], separator="<|sep|>") == TEXTS


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), "dictionary"])
def test_parquet_string_types(tmp_path, kind):
    column = pyarrow.array([*TEXTS, None, ""])
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    table = pyarrow.table({"id": list(range(len(column))), "body": column})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert documents([tmp_path / "a.parquet"], text_column="body") == TEXTS


def test_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntwo")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf"one"\n"two"')
    assert documents([tmp_path / "a.txt"]) == ["one\ntwo"]
    assert documents([tmp_path / "b.jsonl"]) == ["one", "two"]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_large_files_are_cut_between_documents(tmp_path, monkeypatch, suffix):
    """Every size of a task gives the same documents; a text without separators is cut where tokens end."""
    text = "a<s>bb cc<s><s>ccc\u3000 d\u00e9 e<s>"
    write = gzip.compress if suffix else bytes
    (tmp_path / f"a.txt{suffix}").write_bytes(write(text.encode()))
    (tmp_path / f"b.jsonl{suffix}").write_bytes(write("".join(f"{json.dumps(t)}\n" for t in TEXTS[:3]).encode()))
    monkeypatch.setattr(sources, "_STREAM_BYTES", 1)
    for size in range(1, 30):
        monkeypatch.setattr(sources, "TASK_BYTES", size)
        monkeypatch.setattr(sources, "_SEARCH_BYTES", size % 5 + 1)
        assert (
            documents([tmp_path / f"a.txt{suffix}"], separator="<s>") == text.split("<s>")[:2] + text.split("<s>")[3:4]
        )
        assert documents([tmp_path / f"b.jsonl{suffix}"]) == TEXTS[:3]
        pieces = documents([tmp_path / f"a.txt{suffix}"])
        assert "".join(pieces) == text
        tokens = [token for piece in pieces for token in load_tiktoken().encode_ordinary(piece)]
        assert tokens == load_tiktoken().encode_ordinary(text)


@pytest.mark.parametrize("separator", ["\n\n", "\r\n\r\n", "\n---\n"])
def test_separators_match_either_kind_of_line_break(tmp_path, monkeypatch, separator):
    text = separator.replace("\r", "").join(["a\nb", "c", "d"])
    for size in (1, 3, 100):
        monkeypatch.setattr(sources, "TASK_BYTES", size)
        for name, line_break in (("unix", "\n"), ("windows", "\r\n")):
            (tmp_path / f"{name}.txt").write_text(text, newline=line_break)
            found = documents([tmp_path / f"{name}.txt"], separator=separator)
            assert [part.replace("\r\n", "\n") for part in found] == ["a\nb", "c", "d"]


def test_errors_replace_replaces_invalid_bytes(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'"ok"\n"\xff!"\n')
    assert documents([tmp_path / "a.jsonl"], errors="replace") == ["ok", "\ufffd!"]
    table = pyarrow.table(
        {"text": pyarrow.array([b"ok", b"\xff!"], pyarrow.binary()).cast(pyarrow.string(), safe=False)}
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    assert documents([tmp_path / "a.parquet"], errors="replace") == ["ok", "\ufffd!"]
    with pytest.raises(DataError, match=r"a\.parquet: row 2 is not UTF-8"):
        documents([tmp_path / "a.parquet"])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', ["a.jsonl:2", "not JSON"]),
        ("a.jsonl", b'{"body": "x"}\n', ["a.jsonl:1", "'text'", "['body']", "--text_column"]),
        ("a.jsonl", b'{"text": 3}\n', ["a.jsonl:1", "'text'"]),
        ("a.jsonl", b"\n\n[1]\n", ["a.jsonl:3"]),
        ("a.jsonl", b'"ok"\n"\xff"\n', ["a.jsonl:2", "UTF-8", "--errors replace"]),
        ("a.txt", b"fine\nfine\n\xffbad", ["a.txt:3", "byte 10", "UTF-8"]),
        ("a.pdf", b"x", ["a.pdf", "'.pdf'", ".jsonl"]),
        ("a.jsonl.gz", gzip.compress(b'"x"\n' * 9999, mtime=0)[:-20], ["a.jsonl.gz", "truncated"]),
        ("a.jsonl", b'{"text": ["x"]}\n', ["a.jsonl:1", "'text'", "a list"]),
        ("a.txt.gz", b"", ["a.txt.gz", "damaged"]),
        ("a.jsonl.gz", b"not gzip", ["a.jsonl.gz", "damaged"]),
        ("a.jsonl.xz", lzma.compress(b'"x"\n' * 9999)[:-20], ["a.jsonl.xz", "truncated"]),
        ("a.jsonl.zst", zstd(b'"x"\n' * 9999)[:-5], ["a.jsonl.zst", "truncated"]),
        ("a.jsonl.zst", b"not zstd", ["a.jsonl.zst", "damaged"]),
        ("a.parquet", b"PAR1 not parquet", ["a.parquet", "damaged"]),
        ("a.parquet", b"", ["a.parquet", "damaged"]),
    ],
)
def test_unreadable_input_names_file_and_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        documents([tmp_path / name])
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_parquet_without_the_text_column_is_an_error(tmp_path):
    parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column 'text'.*body.*--text_column"):
        documents([tmp_path / "a.parquet"])
    with pytest.raises(DataError, match=r"is int64, not text"):
        documents([tmp_path / "a.parquet"], text_column="n")


def test_damaged_parquet_page_is_an_error(tmp_path):
    parquet.write_table(pyarrow.table({"text": [f"some text {n}" for n in range(9999)]}), tmp_path / "a.parquet")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[2000:2100] = bytes(100)
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet: damaged"):
        documents([tmp_path / "a.parquet"])


def test_too_large_document_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_MAX_DOCUMENT_BYTES", 3_000_000)
    monkeypatch.setattr(sources, "TASK_BYTES", 1_000_000)
    (tmp_path / "a.txt").write_text("x" * 9_000_000)
    with pytest.raises(DataError, match=r"a\.txt:1: a document of more than 3,000,000 bytes.*--separator"):
        documents([tmp_path / "a.txt"])


def test_missing_and_empty_paths_are_errors(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        documents([tmp_path / "nowhere.txt"])
    with pytest.raises(DataError, match=r"no \.txt, \.jsonl"):
        documents([tmp_path])
    with pytest.raises(DataError, match="no file matches this pattern"):
        documents([f"{tmp_path}/*.txt"])
    with pytest.raises(DataError, match="separator is empty"):
        documents([tmp_path], separator="")
