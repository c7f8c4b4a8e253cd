"""Test opening checkpoints: dtype, vocabulary, and what is broken in a folder."""

import copy
import json
import shutil

import pytest
import torch

from common.errors import UserError
from common.models import load_gpt2, load_model, load_tokenizer
from common.weights import weights_sha256
from modeling_gpt2repro import GPT2ReproForCausalLM


def test_dtype_does_not_depend_on_the_saved_one(tiny_gpt2, tmp_path):
    copy.deepcopy(tiny_gpt2).to(torch.float16).save_pretrained(tmp_path)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = load_model(str(tmp_path), dtype=name, device="cpu")
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_weights_hash_depends_on_all_files_but_not_on_the_folders_name(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    seen = [weights_sha256("me/x")]
    for files in ({"1": b"x", "2": b"y"}, {"1": b"y", "2": b"x"}, {"1": b"xy", "2": b""}):
        for name, content in files.items():
            (folder / f"model-{name}.safetensors").write_bytes(content)
        seen.append(weights_sha256(folder))
    assert seen[0] is None and len(set(seen)) == 4
    folder.rename(tmp_path / "b")
    assert weights_sha256(str(tmp_path / "b")) == seen[-1]


def _edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BREAKAGES = {
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "has no tokenizer; put one there with"),
    "fewer weights": (lambda f: _edit_config(f, n_layer=3), "12 tensors that the weights lack or have in another"),
    "other shapes": (lambda f: _edit_config(f, n_positions=64), "(transformer.wpe.weight, ...)"),
    "unknown kind": (lambda f: _edit_config(f, model_type="gpt7"), "model type `gpt7`"),
    "no kind": (lambda f: (f / "config.json").write_text("{}"), "Should have a `model_type` key"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "cannot be opened (TypeError: "),
    "tokenizer broken": (lambda f: (f / "tokenizer.json").write_text("{"), "cannot be opened (JSONDecodeError: "),
    "weights cut short": (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 100), "cannot be opened"),
    "pickled weights": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "no file named model.safetensors",
    ),
}


def test_own_checkpoint_without_tokenizer_is_refused(own_checkpoint, tmp_path):
    """transformers would return an empty tokenizer."""
    folder = tmp_path / "bare"
    shutil.copytree(own_checkpoint, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("kind", BREAKAGES)
def test_broken_checkpoint_is_named(checkpoint, tmp_path, kind):
    breakage, message = BREAKAGES[kind]
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    breakage(folder)
    with pytest.raises(UserError) as raised:
        load_tokenizer(str(folder))
        load_model(str(folder), dtype="float32", device="cpu")
    assert f"checkpoint {str(folder)!r}" in str(raised.value)
    assert message in str(raised.value)


def test_gpt2_of_either_kind_is_opened_as_own_model_with_the_first_tokens(checkpoint, own_checkpoint, tiny_gpt2):
    for folder in (checkpoint, own_checkpoint):
        model = load_gpt2(str(folder), vocab_size=50_000, embd_pdrop=0.3)
        assert type(model) is GPT2ReproForCausalLM
        assert (model.config.vocab_size, model.config.embd_pdrop) == (50_000, 0.3)
        assert torch.equal(model.lm_head.weight, tiny_gpt2.lm_head.weight[:50_000])
        with pytest.raises(UserError, match="has a vocabulary of 50,257 tokens; at least 50,258 are needed"):
            load_gpt2(str(folder), vocab_size=50_258)
