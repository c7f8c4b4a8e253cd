import pytest

from data import DataError
from data.sources import docstrings, file_documents, sample_documents


def test_the_sample_is_english_prose_and_always_the_same():
    documents = list(sample_documents())
    assert documents == list(sample_documents())
    text = "\n".join(documents)
    assert 1_000_000 < len(text) < 5_000_000
    assert 'The "with" statement' in text  # the language reference
    assert "Return a list of" in text  # docstrings
    words = text.split()
    assert sum(word.lower() in ("the", "a", "is", "of", "to", "and") for word in words) > 0.1 * len(words)


def test_docstrings_in_order(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(
        '"""Module."""\nclass A:\n    """Class.\n\n    More.\n    """\n    def f(self):\n        """Method."""\n'
        'async def g():\n    """Function."""\nx = "not a docstring"\n'
    )
    assert docstrings(path) == "Module.\n\nClass.\n\nMore.\n\nMethod.\n\nFunction."
    path.write_text("def (:")
    assert docstrings(path) == ""


def test_files_folders_records_and_separators(tmp_path):
    (tmp_path / "b.txt").write_text("one\n---\ntwo\n---\n \n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jsonl").write_text('{"text": "three"}\n\n"four"\n{"text": ""}\n')
    (tmp_path / "ignored.md").write_text("no")
    assert list(file_documents([tmp_path / "b.txt"])) == ["one\n---\ntwo\n---\n \n"]
    assert list(file_documents([tmp_path], separator="\n---\n")) == ["one", "two", "three", "four"]
    assert list(file_documents([tmp_path / "sub", tmp_path / "b.txt"]))[:2] == ["three", "four"]
    (tmp_path / "k.jsonl").write_text('{"body": "five"}\n')
    assert list(file_documents([tmp_path / "k.jsonl"], text_key="body")) == ["five"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', ["a.jsonl:2", "not JSON"]),
        ("a.jsonl", b'{"body": "x"}\n', ["a.jsonl:1", "'text'", "['body']", "--text_key"]),
        ("a.jsonl", b'{"text": 3}\n', ["a.jsonl:1", "'text'"]),
        ("a.jsonl", b"\n\n[1]\n", ["a.jsonl:3"]),
        ("a.jsonl", b'"ok"\n"\xff"\n', ["a.jsonl:2", "UTF-8"]),
        ("a.txt", b"fine\nfine\n\xffbad", ["a.txt:3", "byte 10", "UTF-8"]),
        ("a.pdf", b"x", ["a.pdf", "'.pdf'", ".jsonl"]),
    ],
)
def test_unreadable_input_names_file_and_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        list(file_documents([tmp_path / name]))
    for word in words:
        assert word in str(error.value)


def test_missing_and_empty_paths(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        list(file_documents([tmp_path / "nowhere.txt"]))
    with pytest.raises(DataError, match=r"no \.txt or \.jsonl"):
        list(file_documents([tmp_path]))
