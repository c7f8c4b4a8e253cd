"""A checkpoint in the formats of other engines, each through the library that keeps it, and each read back."""

import contextlib
import importlib.util
import json
import shutil
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel

from common.files import apply_umask
from eval.checkpoint import NeedsCodeError, check_name, load_gpt2, load_tokenizer
from hub import HubError
from hub.card import Run

# What each format needs beside what training does; the extras of setup.cfg have their names.
_PACKAGES = {"gpt2": (), "onnx": ("onnx", "onnxscript", "onnxruntime"), "gguf": ("gguf",)}
FORMATS = tuple(_PACKAGES)
_CHECKED_TOKENS = 16


def export(checkpoint, *, to, out):
    """
    Args:
        checkpoint: folder of a checkpoint or of a plain GPT-2, or its id on the Hub.
        to: one of FORMATS.
        out: folder that is made; it holds all of the format's files or is not there.

    Returns:
        list of the Paths that were written.

    Raises:
        HubError, EvalError: a package is missing, the folder is not empty, the checkpoint is no GPT-2, the disk is
            full, what was written does not give what the model gives.
    """
    from safetensors import SafetensorError

    out = Path(out).absolute()  # "." has no name
    if missing := [name for name in _PACKAGES[to] if importlib.util.find_spec(name) is None]:
        raise HubError(f'--to {to}: {", ".join(missing)} not installed: pip install -e ".[{to}]"')
    try:
        is_taken = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    except OSError as error:  # a name that is too long, a folder of somebody else's
        raise HubError(f"--out {str(out)!r} cannot be written ({error.strerror}): name another folder") from error
    if is_taken:
        raise HubError(f"--out {str(out)!r} is there already: name another folder, or remove it")
    checkpoint = check_name(checkpoint)
    only = "only a GPT-2 (gpt2 or gpt2repro) can be exported"
    try:
        tokenizer, config = load_tokenizer(checkpoint)
    except NeedsCodeError:
        raise HubError(f"checkpoint {checkpoint!r} brings modeling code of its own; {only}") from None
    if config.model_type not in ("gpt2repro", "gpt2"):
        raise HubError(f"checkpoint {checkpoint!r} is a {config.model_type!r} model; {only}")
    if len(tokenizer) > config.vocab_size:
        raise HubError(
            f"checkpoint {checkpoint!r}: the tokenizer has {len(tokenizer):,} tokens and the model "
            f"{config.vocab_size:,}; put the model's own tokenizer there"
        )
    model = load_gpt2(checkpoint).eval()
    if not model.config.is_causal:
        raise HubError(f"checkpoint {checkpoint!r} has is_causal=False: it is a text encoder and cannot be exported")
    aside = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _WRITERS[to](model, tokenizer, aside, name=_name_of(checkpoint), license_id=_license_of(checkpoint))
        apply_umask(aside)
        if out.exists():
            out.rmdir()
        aside.rename(out)
    except (OSError, SafetensorError) as error:
        raise HubError(f"--out {str(out)!r} cannot be written ({error}): make room there, or name another") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return sorted(path for path in out.rglob("*") if path.is_file())


def _name_of(checkpoint):
    """runs/x/checkpoints/step_000100 -> x-step_000100; openai-community/gpt2 -> gpt2"""
    path = Path(checkpoint).resolve() if Path(checkpoint).is_dir() else Path(checkpoint)
    return f"{path.parent.parent.name}-{path.name}" if path.parent.name == "checkpoints" else path.name


def _license_of(checkpoint):
    with contextlib.suppress(HubError):  # a run that cannot be read: nobody knows
        return Run(Path(checkpoint)).license_id
    return None


def write_gpt2(model, tokenizer, folder, **_):
    """A folder of transformers' own GPT2LMHeadModel, with the vocabulary in both of the forms that engines read."""
    plain = model.to_gpt2()
    plain.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    compare_logits(model, lambda ids: GPT2LMHeadModel.from_pretrained(folder).eval()(ids).logits, tolerance=1e-4)


def save_tokenizer(tokenizer, folder):
    """transformers' files, and vocab.json and merges.txt, which engines older than tokenizer.json read."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # what the tokenizers package raises when the disk is full
        raise OSError(str(error)) from error
    vocabulary, merges = bpe_of(tokenizer)
    lines = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(lines, encoding="utf-8", newline="\n")  # other engines split at \n alone


def bpe_of(tokenizer):
    """
    Returns:
        ({token: id}, list of pairs that are merged, best first): of GPT-2's byte-level BPE.

    Raises:
        HubError: it is a tokenizer of another kind.
    """
    with contextlib.suppress(AttributeError, KeyError, ValueError):
        described = json.loads(tokenizer.backend_tokenizer.to_str())
        if described["model"]["type"] == "BPE" and described["pre_tokenizer"]["type"] == "ByteLevel":
            merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in described["model"]["merges"]]
            return dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])), merges
    raise HubError(f"the checkpoint's tokenizer, a {type(tokenizer).__name__}, is not GPT-2's byte-level BPE")


@torch.no_grad()
def compare_logits(model, logits_of, *, tolerance):
    """
    Raises HubError where what was written gives other logits than the model.

    Args:
        logits_of: function of ids [2, T] that gives [2, T, V].
        tolerance: largest difference.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(_CHECKED_TOKENS, model.config.n_positions)
    ids = torch.randint(0, model.config.vocab_size, (2, length), generator=generator)
    expected = model(ids).logits
    if not expected.isfinite().all():
        raise HubError("the model's logits are not finite: its training diverged; export an earlier checkpoint")
    difference = (logits_of(ids) - expected).abs().max().item()
    if not difference <= tolerance:
        raise HubError(f"what was written gives logits that are off by {difference:.2g} (allowed: {tolerance:.2g})")


def _write_onnx(model, tokenizer, folder, **_):
    from hub.to_onnx import write_onnx

    write_onnx(model, tokenizer, folder)


def _write_gguf(model, tokenizer, folder, **about):
    from hub.to_gguf import write_gguf

    write_gguf(model, tokenizer, folder, **about)


_WRITERS = {"gpt2": write_gpt2, "onnx": _write_onnx, "gguf": _write_gguf}
