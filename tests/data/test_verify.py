"""`verify`, and preparing again: every damage is found, named and repaired."""

import hashlib
import random
import time

import numpy as np
import pytest
from shard_folders import DOCUMENTS, content_of, jsonl, jsonl_folder, times_of

from data import DataError
from data.manifest import open_split, read_manifest
from data.prepare import prepare
from data.shards import write_shard
from data.sources import FileSource
from data.tokenizer import Tokenizer
from data.train_tokenizer import train_tokenizer
from data.verify import main, verify

TEXTS = DOCUMENTS[:120]


def prepare_again(folder, **options):
    """Prepare the texts, with lines for the user."""
    lines = []
    options = {"name": "t", "val_fraction": 0.2, "shard_tokens": 400, "log": lines.append, **options}
    prepare(FileSource([folder.parent / "text"]), folder, **options)
    return lines


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Six parts of two or three shards."""
    monkeypatch.setattr("data.plan.TASK_BYTES", 1)
    jsonl_folder(tmp_path / "text", TEXTS, 6)
    prepare_again(tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content[:1200] + b"\1\1" + content[1202:], "bytes 1,024 to 1,"),
        (lambda content: content[:-4], "are missing"),
        (lambda content: content + b"\0\0", "bytes from"),
        (lambda content: content[:600] + b"\1" + content[601:], "bytes 0 to 1,023"),
        (lambda content: b"#!/bin/sh" + content[9:], "bytes 0 to 3"),
        (None, "is missing"),
    ],
)
def test_damaged_shard_is_named_and_repaired(folder, damage, words):
    checked, problems = verify(folder)
    assert len(checked) == len(read_manifest(folder).shards) > 6
    assert problems == {}
    before, times = content_of(folder), times_of(folder)
    entry = read_manifest(folder).shards[5]
    victim = folder / entry["file"]
    if damage:
        victim.write_bytes(damage(victim.read_bytes()))
    else:
        victim.unlink()
    _, problems = verify(folder)
    assert list(problems) == [victim.name]
    assert words in problems[victim.name]
    assert "repair    1 files are damaged or missing" in prepare_again(folder)
    assert content_of(folder) == before
    of_part = {shard["file"] for shard in read_manifest(folder).shards if shard["part"] == entry["part"]}
    changed = {name for name, time in times_of(folder).items() if times[name] != time}
    assert victim.name in changed <= {*of_part, "manifest.json"}


def test_repair_refuses_a_changed_source(folder, tmp_path):
    victim = folder / read_manifest(folder).shards[0]["file"]
    victim.unlink()
    text = tmp_path / "text" / "0.jsonl"
    text.write_text(text.read_text().replace("Document 1.", "Document I."))
    with pytest.raises(DataError, match="cannot be repaired: its source has changed"):
        prepare_again(folder)
    assert read_manifest(folder) is None
    with pytest.raises(DataError, match="has other content"):
        prepare_again(folder)


@pytest.mark.parametrize("moment", ["prepare.finish", "plan.write_json_with_checksum"])
def test_interrupted_repair_is_still_one(folder, tmp_path, monkeypatch, moment):
    """It does not make the other shards again, and still refuses a changed source."""
    before, times = content_of(folder), times_of(folder)
    entry = read_manifest(folder).shards[0]
    (folder / entry["file"]).unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"data.{moment}", interrupt)
        prepare_again(folder)
    text = tmp_path / "text" / "0.jsonl"
    intact = text.read_text()
    prepare_again(folder)
    assert content_of(folder) == before
    of_part = {shard["file"] for shard in read_manifest(folder).shards if shard["part"] == entry["part"]}
    assert {name for name, time in times_of(folder).items() if times[name] != time} <= {*of_part, "manifest.json"}
    (folder / entry["file"]).unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"data.{moment}", interrupt)
        prepare_again(folder)
    text.write_text(intact.replace("Document 1.", "Document I."))
    if moment == "prepare.finish":  # its task is done: the text is not read again
        prepare_again(folder)
        assert content_of(folder) == before
    else:
        with pytest.raises(DataError, match="cannot be repaired: its source has changed"):
            prepare_again(folder)


def interrupt(*arguments, **options):
    raise KeyboardInterrupt


def test_damaged_tokenizer_is_named_and_repaired(tmp_path):
    jsonl_folder(tmp_path / "text", TEXTS, 2)
    tokenizer = train_tokenizer(FileSource([tmp_path / "text"]), tmp_path / "own", vocab_size=300)
    prepare_again(tmp_path / "out", tokenizer=tokenizer)
    before = content_of(tmp_path / "out")
    (tmp_path / "out" / "tokenizer" / "tokenizer.json").write_text("{}")
    assert list(verify(tmp_path / "out")[1]) == ["tokenizer"]
    prepare_again(tmp_path / "out", tokenizer=tokenizer)
    assert content_of(tmp_path / "out") == before and verify(tmp_path / "out")[1] == {}


def test_a_repair_records_the_tokenizer_files_that_it_writes(tmp_path, monkeypatch):
    """Another version of transformers writes other bytes for the same tokenizer."""
    jsonl_folder(tmp_path / "text", TEXTS, 2)
    tokenizer = train_tokenizer(FileSource([tmp_path / "text"]), tmp_path / "own", vocab_size=300)
    prepare_again(tmp_path / "out", tokenizer=tokenizer)
    (tmp_path / "out" / read_manifest(tmp_path / "out").shards[0]["file"]).unlink()
    save = Tokenizer.save

    def save_differently(self, folder):
        save(self, folder)
        with (folder / "tokenizer_config.json").open("a") as file:
            file.write("\n")
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}

    monkeypatch.setattr(Tokenizer, "save", save_differently)
    prepare_again(tmp_path / "out", tokenizer=tokenizer)
    assert verify(tmp_path / "out")[1] == {}


def test_interrupt_does_not_wait_for_the_other_shards(tmp_path, monkeypatch):
    for number in range(40):
        write_shard(tmp_path / f"x_train_{number:06d}.bin", np.arange(50))
    checked = []

    def check(path, entry, vocabulary):
        checked.append(path)
        if len(checked) == 2:
            raise KeyboardInterrupt
        time.sleep(0.05)

    monkeypatch.setattr("data.verify._find_problem", check)
    with pytest.raises(KeyboardInterrupt):
        verify(tmp_path)
    assert len(checked) < 10


def test_repair_keeps_the_limit_of_tokens(folder, tmp_path):
    out = tmp_path / "some"
    prepare_again(out, max_tokens=2500)
    before = content_of(out)
    for number in (-1, 0):
        (out / read_manifest(out).shards[number]["file"]).unlink()
        prepare_again(out, max_tokens=2500)
        assert content_of(out) == before


def test_shards_without_a_manifest(tmp_path):
    path = tmp_path / "x_train_000001.bin"
    write_shard(path, np.arange(50))
    write_shard(tmp_path / "x_val_000000.bin", np.arange(50))
    assert verify(tmp_path)[1] == {}
    content = path.read_bytes()
    path.write_bytes(content[:1122] + b"\xff\xff" + content[1124:])
    assert "token 49 is 65535" in verify(tmp_path)[1][path.name]
    with pytest.raises(DataError, match="no such folder"):
        verify(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no shards"):
        verify(tmp_path / "empty")


def test_command_reports_damage(folder, capsys):
    assert main([str(folder)]) == 0
    assert "match their checksums" in capsys.readouterr().out
    victim = next(folder.glob("*.bin"))
    victim.write_bytes(victim.read_bytes()[:-2])
    assert main([str(folder)]) == 1
    error = capsys.readouterr().err
    assert f"error: {victim}: " in error
    assert "error: 1 of " in error
    assert main([str(folder), "--repair"]) == 2
    assert "--repair is gone; " in capsys.readouterr().err


MUTATIONS = {
    "flip": lambda rng, content, at: content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :],
    "bytes": lambda rng, content, at: content[:at] + rng.randbytes(rng.randrange(1, 20)) + content[at + 20 :],
    "zero": lambda rng, content, at: content[:at] + bytes(len(content[at : at + 100])) + content[at + 100 :],
    "cut": lambda rng, content, at: content[:at],
    "longer": lambda rng, content, at: content + rng.randbytes(rng.randrange(1, 10)),
    "shift": lambda rng, content, at: content[:at] + content[at + rng.randrange(1, 5) :],
    "double": lambda rng, content, at: content[: at + rng.randrange(1, 100)] + content[at:],
    "text": lambda rng, content, at: content.replace(b"train", b"val", rng.randrange(1, 3)),
}


def mutate(rng, folder):
    """Damage a random file in a random way; return the kind and the path."""
    paths = sorted(folder.iterdir())
    path = rng.choice([*paths, folder / "manifest.json"])
    kind = rng.choice([*MUTATIONS, "flip", "swap", "missing"])
    if kind == "missing":
        path.unlink()
    elif kind == "swap":
        path.write_bytes(rng.choice(paths).read_bytes())
    else:
        content = path.read_bytes()
        path.write_bytes(MUTATIONS[kind](rng, content, rng.randrange(len(content))))
    return kind, path


def test_random_damage_is_always_detected(tmp_path, rounds=1000):
    """Reading a mutated shard or manifest gives the same tokens or a DataError; `verify` names the changed file."""

    def all_tokens():
        return {split: [shard[:].tolist() for shard in open_split(folder, split)] for split in ("train", "val")}

    folder = tmp_path / "out"
    source = FileSource([jsonl(tmp_path / "text" / "a.jsonl", TEXTS)])
    prepare(source, folder, name="t", val_fraction=0.2, shard_tokens=1500)
    intact, tokens = content_of(folder), all_tokens()
    rng = random.Random(rounds)
    refused = 0
    for _ in range(rounds):
        kind, path = mutate(rng, folder)
        is_changed = content_of(folder) != intact
        try:
            assert all_tokens() == tokens, (kind, path)
        except DataError as error:
            assert "\n" not in str(error)
            assert str(folder) in str(error)
            refused += 1
        try:
            problems = verify(folder)[1]
        except DataError as error:
            assert str(folder) in str(error)
            problems = {"manifest.json": error}
        if is_changed and path.suffix == ".bin":
            assert list(problems) == [path.name], (kind, path)
        elif not is_changed:
            assert problems == {}
        path.write_bytes(intact[path.name])
    assert refused > rounds / 2
