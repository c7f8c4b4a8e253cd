"""Export a checkpoint to the formats of other engines.

The library that defines a format writes it, and the result is read back and compared before it gets its name.
"""

import contextlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

from common.files import apply_umask
from common.models import check_name, load_gpt2, load_gpt2_config, load_tokenizer
from hub import HubError
from hub.card import license_id, read_run
from hub.to_gguf import byte_level_bpe, write_gguf
from hub.to_onnx import write_onnx
from modeling_gpt2repro import GPT2ReproForCausalLM

# Packages that a format needs in addition to those of training. The extras of setup.cfg have the same names.
_PACKAGES: dict[str, tuple[str, ...]] = {
    "gpt2": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "gguf": ("gguf",),
}


def export(checkpoint: str, *, to: str, out: str | Path) -> list[Path]:
    """Write a checkpoint in another format and return the paths of the files.

    Args:
        checkpoint: folder of a checkpoint or of a plain GPT-2, or its id on the Hub.
        to: "gpt2", "onnx" or "gguf".
        out: new folder. It appears only when all files are written and checked.

    Raises:
        UserError: a package is missing, the folder is not empty, the checkpoint is not a GPT-2, the disk is
            full, or the written files do not give the model's numbers.
    """
    out = Path(out).absolute()  # "." has no name
    if missing := [name for name in _PACKAGES[to] if importlib.util.find_spec(name) is None]:
        raise HubError(f'--to {to}: {", ".join(missing)} not installed: pip install -e ".[{to}]"')
    try:
        is_free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    except OSError as error:  # name too long, no permission
        raise HubError(f"--out {str(out)!r} cannot be written ({error.strerror}): name another folder") from error
    if not is_free:
        raise HubError(f"--out {str(out)!r} exists and is not an empty folder: name another folder, or remove it")
    checkpoint = check_name(checkpoint)
    config = load_gpt2_config(checkpoint)
    tokenizer, _ = load_tokenizer(checkpoint, trust_remote_code=None)
    if len(tokenizer) > config.vocab_size:
        raise HubError(
            f"checkpoint {checkpoint!r}: the tokenizer has {len(tokenizer):,} tokens and the model "
            f"{config.vocab_size:,}; put the model's own tokenizer there"
        )
    model = load_gpt2(checkpoint).eval()
    if not model.config.is_causal:
        raise HubError(f"checkpoint {checkpoint!r} has is_causal=False: a text encoder cannot be exported")
    tmp_path = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(tmp_path, ignore_errors=True)
        tmp_path.mkdir(parents=True)
        if to == "gguf":
            write_gguf(model, tokenizer, tmp_path, name=_model_name(checkpoint), license=_license(checkpoint))
        else:
            save_tokenizer(tokenizer, tmp_path)
            for exported in (write_gpt2 if to == "gpt2" else write_onnx)(model, tmp_path):
                compare_logits(model, exported, tolerance=1e-4 if to == "gpt2" else 1e-3)
        apply_umask(tmp_path)
        if out.exists():
            out.rmdir()
        tmp_path.rename(out)
    except (OSError, SafetensorError) as error:
        raise HubError(f"--out {str(out)!r} cannot be written ({error}): free some space, or name another") from error
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)
    return sorted(path for path in out.rglob("*") if path.is_file())


def _model_name(checkpoint: str) -> str:
    """Return a name for files: runs/x/checkpoints/step_000100 -> x-step_000100, openai-community/gpt2 -> gpt2."""
    path = Path(checkpoint).resolve() if Path(checkpoint).is_dir() else Path(checkpoint)
    return f"{path.parent.parent.name}-{path.name}" if path.parent.name == "checkpoints" else path.name


def _license(checkpoint: str) -> str | None:
    path = Path(checkpoint)
    with contextlib.suppress(HubError):  # the run cannot be read: the license is not known
        return license_id(read_run(path), path)
    return None


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save transformers' tokenizer files, and vocab.json and merges.txt for engines older than tokenizer.json."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers package raises a plain Exception if the disk is full
        raise OSError(str(error)) from error
    vocabulary, merges = byte_level_bpe(tokenizer)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    (folder / "merges.txt").write_text(lines, encoding="utf-8", newline="\n")  # other engines split at \n alone


def write_gpt2(model: GPT2ReproForCausalLM, folder: Path) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """Write transformers' own GPT2LMHeadModel in float32. Return a function that reads it back, for its logits.

    The weights have the names of OpenAI's own file on the Hub, `h.0...`: mlx_lm reads only those.
    """
    gpt2 = model.to_gpt2()
    weights = gpt2.transformer.state_dict()
    if not gpt2.config.tie_word_embeddings:
        weights["lm_head.weight"] = gpt2.lm_head.weight
    gpt2.save_pretrained(folder, state_dict=weights)
    return [lambda ids: GPT2LMHeadModel.from_pretrained(folder).eval()(ids).logits]


@torch.no_grad()
def compare_logits(
    model: GPT2ReproForCausalLM, exported_logits: Callable[[torch.Tensor], torch.Tensor], *, tolerance: float
) -> None:
    """Compare logits with those of an exported model, which maps token ids [B, T] to logits [B, T, V].

    Raises HubError if they differ by more than the tolerance, or are not finite.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(16, model.config.n_positions)
    ids = torch.randint(0, model.config.vocab_size, (2, length), generator=generator)
    difference = (exported_logits(ids) - model(ids).logits).abs().max().item()
    if not difference <= tolerance:  # also if it is not a number
        raise HubError(f"the exported model's logits differ by {difference:.2g} (allowed: {tolerance:.2g})")
