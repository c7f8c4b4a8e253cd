"""Tokenizers other than GPT-2's: training one, shards with it, nanoGPT's data sets, and a model from end to end."""

import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from shard_folders import DOCUMENTS, jsonl
from transformers import AutoTokenizer

from common.errors import UserError
from data import DataError, train_tokenizer
from data.manifest import Manifest, open_split, read_manifest, record_tokenizer, shard_tokenizer
from data.nanogpt import read_plain_pickle
from data.prepare import main, prepare
from data.pretokenized import import_shards
from data.shards import open_shard, scan_shard, write_shard
from data.sources import FileSource
from data.tokenizer import GPT2, Vocabulary, check_same_tokenizer, open_tokenizer
from data.verify import verify

LARGE = Vocabulary(100_000, 99_999)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    path = jsonl(folder / "text.jsonl", [*DOCUMENTS, "naïve café 漢字", "<|endoftext|> in a text"])
    assert train_tokenizer.main(["train", str(path), "--vocab_size", "400", "--out", str(folder / "bpe")]) == 0
    return open_tokenizer(str(folder / "bpe"))


def write_shards(folder, tokenizer, texts):
    """Write a folder of shards as a preparation does."""
    folder.mkdir()
    entries = []
    for number, split in enumerate(("val", "train")):
        tokens = np.concatenate([tokenizer.encode_document(text) for text in texts])
        path = folder / f"s_{split}_{number:06d}.bin"
        write_shard(path, tokens, tokenizer.vocabulary)
        scan = scan_shard(path, vocabulary=tokenizer.vocabulary)
        del scan["crc32_of_all"]
        entries.append({"file": path.name, "split": split, "part": 0, **scan})
    manifest = Manifest(
        name="s",
        source={"kind": "test"},
        split_rule="both",
        tokenizer=record_tokenizer(tokenizer, folder),
        shards=entries,
    )
    manifest.write(folder / "manifest.json")
    return folder


def test_trained_tokenizer_opens_in_transformers_with_the_same_tokens(own):
    hf = AutoTokenizer.from_pretrained(own.name)
    for text in [*DOCUMENTS[:9], "naïve <|endoftext|> café 漢字 \t\n ", ""]:
        ids = own.encode_document(text).tolist()
        assert ids == [own.vocabulary.eos_id, *hf(text, split_special_tokens=True).input_ids]
        assert hf.decode(ids[1:]) == text
        assert own.byte_lengths()[ids].sum() == len(text.encode())
    assert (own.vocab_size, own.vocabulary.dtype, len(hf)) == (400, np.uint16, 400)
    assert hf("x <|endoftext|>").input_ids[-1] == hf.eos_token_id == hf.bos_token_id == own.vocabulary.eos_id
    assert pickle.loads(pickle.dumps(own)).sha256 == own.sha256  # as sent to worker processes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--vocab_size", "256"), "--vocab_size must be at least 257"),
        (("nowhere.txt",), "nowhere.txt: no such file"),
    ],
)
def test_mistakes_in_training_are_one_line(arguments, words, own, tmp_path, capsys):
    text = jsonl(tmp_path / "x.jsonl", ["a"])
    assert train_tokenizer.main(["train", str(text), *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_gpt2_by_any_name_is_gpt2(tmp_path):
    GPT2.hf().save_pretrained(tmp_path / "saved")
    assert open_tokenizer(str(tmp_path / "saved")) == open_tokenizer("gpt2") == GPT2
    with pytest.raises(DataError, match="--eos_token must be"):
        open_tokenizer("gpt2", eos_token="x")


def test_a_folder_called_gpt2_comes_first(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own.hf().save_pretrained("gpt2")
    assert open_tokenizer("gpt2").sha256 == own.sha256
    write_shards(tmp_path / "shards", open_tokenizer("gpt2"), DOCUMENTS)
    assert shard_tokenizer("shards").sha256 == own.sha256


def test_tokenizers_that_cannot_be_used_are_one_line(own, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no tokenizer\.json"):
        open_tokenizer(str(tmp_path / "empty"))
    with pytest.raises(DataError, match="gigatoken is for GPT-2's tokenizer"):
        open_tokenizer(own.name, backend="gigatoken")
    with pytest.raises(DataError, match="--eos_token 'nothing' is not a token"):
        open_tokenizer(own.name, eos_token="nothing")
    with pytest.raises(UserError, match="tokenizer 'no/where'"):
        open_tokenizer("no/where")
    hf = own.hf()
    hf.eos_token = None
    hf.save_pretrained(tmp_path / "no_eos")
    with pytest.raises(DataError, match=r"has no eos token.*--eos_token"):
        open_tokenizer(str(tmp_path / "no_eos"))
    assert open_tokenizer(str(tmp_path / "no_eos"), eos_token="<|endoftext|>").sha256 == own.sha256


def test_shards_carry_their_tokenizer(own, tmp_path):
    folder = write_shards(tmp_path / "shards", own, DOCUMENTS)
    loaded = shard_tokenizer(folder)
    assert (loaded.sha256, loaded.vocabulary) == (own.sha256, own.vocabulary)
    [shard] = open_split(folder, "train")
    assert shard[:].tolist() == [token for text in DOCUMENTS for token in loaded.encode_document(text)]
    assert read_manifest(folder).shards[1]["documents"] == len(DOCUMENTS)
    with pytest.raises(DataError, match="another tokenizer"):
        GPT2.hf().save_pretrained(tmp_path / "gpt2")
        check_same_tokenizer(str(tmp_path / "gpt2"), own)
    check_same_tokenizer(own.name, own)
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(DataError, match="does not match its checksum"):
        shard_tokenizer(folder)


def test_uint32_shards(tmp_path):
    path, tokens = tmp_path / "x_train_000001.bin", [99_999, 70_000, 1]
    write_shard(path, tokens, LARGE)
    assert path.read_bytes() == struct.pack("<256i", 20240801, 7, 3, *[0] * 253) + struct.pack("<3I", *tokens)
    shard = open_shard(path, scan_shard(path, vocabulary=LARGE)["crc32"], vocabulary=LARGE)
    assert (shard[:].tolist(), shard.dtype) == (tokens, np.uint32)
    with pytest.raises(DataError, match=r"uint32 tokens.*GPT-2's unless --tokenizer"):
        open_shard(path)
    with pytest.raises(DataError, match=r"token 0 is 99999.*only 66,000.*bytes 1,024 to 1,027"):
        scan_shard(path, vocabulary=Vocabulary(66_000, 0))


def test_nanogpt_data_sets(tmp_path, own, capsys):
    text = "to be, or not\n"
    characters = sorted(set(text))
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters))}
    meta["stoi"] = {character: i for i, character in meta["itos"].items()}
    ids = [meta["stoi"][character] for character in text]
    for protocol in (2, 4):
        (folder := tmp_path / f"char{protocol}").mkdir()
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
        assert read_plain_pickle(folder / "meta.pkl") == meta
        for split in ("train", "val"):
            np.array(ids, dtype=np.uint16).tofile(folder / f"{split}.bin")
    with pytest.raises(DataError, match=r"meta\.pkl.*pretokenized"):
        open_split(folder, "train")
    assert main(["pretokenized", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert [shard[:].tolist() for shard in open_split(tmp_path / "out", "train")] == [ids]
    tokenizer = shard_tokenizer(tmp_path / "out")
    assert tokenizer.encode_document(text, starts=False).tolist() == ids
    assert tokenizer.hf().decode(ids) == text
    assert tokenizer.vocab_size == len(characters) + 1
    (folder / "meta.pkl").write_bytes(pickle.dumps({"x": print}))
    assert main(["pretokenized", str(folder), "--out", str(tmp_path / "other")]) == 2
    assert "what could run code is not unpickled" in capsys.readouterr().err
    import_shards(folder, tmp_path / "named", tokenizer=own)
    assert shard_tokenizer(tmp_path / "named").sha256 == own.sha256
    (folder / "meta.pkl").unlink()  # nanoGPT's word-level sets have GPT-2's tokens
    assert [shard[:].tolist() for shard in open_split(folder, "val")] == [ids]


@pytest.mark.parametrize("num_proc", [1, 2])
def test_preparing_with_another_tokenizer(tmp_path, own, num_proc):
    (tmp_path / "text.jsonl").write_text("".join(f"{json.dumps(text)}\n" for text in DOCUMENTS))
    options = {"name": "t", "val_fraction": 0.2, "tokenizer": own, "num_proc": num_proc}
    prepare(FileSource([tmp_path / "text.jsonl"]), tmp_path / "out", **options)
    assert shard_tokenizer(tmp_path / "out").sha256 == own.sha256
    assert verify(tmp_path / "out")[1] == {}
    import_shards(tmp_path / "out", tmp_path / "again")  # it brings its tokenizer
    assert shard_tokenizer(tmp_path / "again").sha256 == own.sha256
    tokens = {split: [t for s in open_split(tmp_path / "out", split) for t in s[:]] for split in ("train", "val")}
    assert len(tokens["train"]) + len(tokens["val"]) == sum(len(own.encode_document(text)) for text in DOCUMENTS)
    with pytest.raises(DataError, match=r"already exists with tokenizer .*, got another one"):
        prepare(FileSource([tmp_path / "text.jsonl"]), tmp_path / "out", name="t", val_fraction=0.2)


def test_a_tokenizer_in_the_folder_to_make_is_kept(tmp_path, own):
    """The tokenizer is the user's, not left over from an interrupted preparation."""
    (tmp_path / "text.jsonl").write_text("".join(f"{json.dumps(text)}\n" for text in DOCUMENTS))
    own.save(tmp_path / "mine" / "tokenizer")
    for tokenizer in (own, GPT2):
        with pytest.raises(DataError, match="already exists and has other content"):
            prepare(FileSource([tmp_path / "text.jsonl"]), tmp_path / "mine", name="t", tokenizer=tokenizer)
    assert open_tokenizer(str(tmp_path / "mine" / "tokenizer")).sha256 == own.sha256


def test_manifests_of_format_2_open(tmp_path):
    folder = write_shards(tmp_path / "shards", GPT2, DOCUMENTS[:5])
    from data.manifest import write_json_with_checksum

    content = json.loads((folder / "manifest.json").read_text())
    record = content.pop("tokenizer")
    content |= {"format_version": 2, "tokenizer": "gpt2", "tokenizer_sha256": record["sha256"], "gone": 1}
    del content["sha256_of_the_rest"]
    write_json_with_checksum(folder / "manifest.json", content)
    assert shard_tokenizer(folder).is_gpt2
    assert len(open_split(folder, "train")) == 1


@pytest.mark.slow
def test_from_a_trained_tokenizer_to_a_model_in_a_fresh_process(own, tmp_path):
    import subprocess
    import sys

    import train
    from eval.bits_per_byte.task import Task
    from hub.export import export

    shards = write_shards(tmp_path / "shards", own, DOCUMENTS * 20)
    run = tmp_path / "run"
    arguments = f"""--data.path {shards} --data.prepare_sample false --output_dir {run} --max_steps 3 --eval_every 3
        --model.n_layer 1 --model.n_head 2 --model.n_embd 32 --model.n_positions 64 --batch.seq_len 32
        --batch.tokens_per_step 128 --batch.micro_batch_size 4 --eval.val_tokens 1024 --eval.ngram_baselines true
        --eval.hellaswag null --mixed_precision no --eval.sample_tokens 8""".split()
    assert train.train(arguments) == 0
    checkpoint = run / "checkpoints" / "step_000003"
    config = json.loads((checkpoint / "config.json").read_text())
    eos_id = own.vocabulary.eos_id
    assert [config[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")] == [*(400, eos_id, eos_id)]
    export(str(checkpoint), to="gpt2", out=tmp_path / "gpt2")
    items, _ = Task(data=str(shards), limit=2).read(AutoTokenizer.from_pretrained(tmp_path / "gpt2"), 64)
    assert len(items) == 2
    with pytest.raises(UserError, match="other data"):  # GPT-2's shards are not those of the run
        other = write_shards(tmp_path / "other", GPT2, DOCUMENTS * 20)
        train.train([*arguments, "--resume", "auto", "--data.path", str(other)])
    with pytest.raises(UserError, match=r"vocabulary|another tokenizer"):
        train.train(
            [*arguments, "--data.path", str(other), "--output_dir", str(tmp_path / "b"), "--init_from", str(checkpoint)]
        )
    program = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    inputs = tokenizer("Some words of it", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=4, pad_token_id=tokenizer.eos_token_id)
    print(len(tokenizer), model.config.vocab_size, tokenizer.decode(output[0])[:16])
"""
    done = subprocess.run(
        [sys.executable, "-c", program, checkpoint, tmp_path / "gpt2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines()[:1] == ["400 400 Some words of it"] and done.returncode == 0, done.stderr


def test_tokenizer_is_made_in_the_current_folder(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = Path(own.name).parent / "text.jsonl"
    assert train_tokenizer.main(["train", str(text), "--vocab_size", "400", "--out", "."]) == 0
    assert open_tokenizer(str(tmp_path)).sha256 == own.sha256
