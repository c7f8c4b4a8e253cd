"""The model that the commands score: from a folder, or from the Hub."""

import hashlib
from pathlib import Path

import torch

from common.checkpoints import resolve_checkpoint
from common.errors import one_line
from common.weights import weights_problem
from eval import EvalError
from eval.hub import why_unreachable


class NeedsCodeError(EvalError):
    """A model from the Hub is of no kind that transformers knows, and its code was not to be run."""


def check_name(model):
    """
    Check that a name is a checkpoint's folder or the id of a model on the Hub.

    Returns:
        the name to open: the step folder where it is .../checkpoints/best, else the name itself.

    Raises:
        UserError: it is neither.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    model = resolve_checkpoint(model)
    folder = Path(model)
    try:
        is_folder = folder.is_dir()
    except OSError as error:  # a name that is too long, a folder of somebody else's
        raise EvalError(f"checkpoint {model!r} cannot be opened ({error.strerror}); give another") from error
    if is_folder:
        if (folder / "adapter_config.json").is_file() and (problem := weights_problem(folder)):
            raise EvalError(f"checkpoint {model!r}: {problem}")
        if not (folder / "config.json").is_file():
            inside = sorted([*folder.glob("*/config.json"), *folder.glob("*/*/config.json")])
            hint = f"did you mean {str(inside[-1].parent)!r}?" if inside else "give the folder that holds it"
            raise EvalError(f"checkpoint {model!r} has no config.json, so it is no checkpoint; {hint}")
        if problem := weights_problem(folder):
            raise EvalError(f"checkpoint {model!r}: {problem}")
    elif folder.exists():
        raise EvalError(f"checkpoint {model!r} is a file; give the folder it is in")
    else:
        try:
            validate_repo_id(model)
        except HFValidationError as error:
            raise EvalError(f"checkpoint {model!r}: no such folder, nor a Hub id (owner/name)") from error
    return model


def load_tokenizer(name, *, trust_remote_code=False):
    """
    Args:
        name: a checkpoint's folder, or the id of a model on the Hub, whose code is run only with trust_remote_code.

    Returns:
        (tokenizer, the model's config)

    Raises:
        EvalError: it is not there, or has no tokenizer.
    """
    from transformers import AutoTokenizer

    # What transformers makes of a folder without tokenizer files: an error about their formats, or nothing at all.
    folder = Path(name)
    has_files = not folder.is_dir() or any(folder.glob("tokenizer*")) or any(folder.glob("vocab*"))
    tokenizer = _from_pretrained(AutoTokenizer, name, trust_remote_code) if has_files else None
    if tokenizer is None or tokenizer.vocab_size == 0:
        raise EvalError(f"checkpoint {name!r} has no tokenizer; put one there with tokenizer.save_pretrained")
    return tokenizer, load_config(name, trust_remote_code=trust_remote_code)


def load_config(name: str, *, trust_remote_code: bool = False):
    """Return a checkpoint's config, a transformers PreTrainedConfig. Raises EvalError like `load_tokenizer`."""
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, name, trust_remote_code)


def load_gpt2(name: str, **fields):
    """
    Open a GPT-2 as this project's model: one of this project's checkpoints, or one of transformers' GPT-2.

    Args:
        name: as for `load_tokenizer`. This project's code is used, not the code in an older checkpoint's folder.
        fields: settings of the config to change (embd_pdrop, ...).

    Returns:
        GPT2ReproForCausalLM in float32 on the CPU.

    Raises:
        EvalError: the checkpoint cannot be opened, is not a GPT-2, or has weights that are not finite.
    """
    from transformers import GPT2LMHeadModel

    from modeling_gpt2repro import GPT2ReproForCausalLM

    kind = load_config(name).model_type
    if kind not in ("gpt2", "gpt2repro"):
        raise EvalError(f"checkpoint {name!r} is a {kind!r} model; it must be a GPT-2 ('gpt2' or 'gpt2repro')")
    model_class = GPT2LMHeadModel if kind == "gpt2" else GPT2ReproForCausalLM
    model = load_model(name, dtype="float32", device="cpu", model_class=model_class, **fields)
    if kind == "gpt2":
        try:
            model = GPT2ReproForCausalLM.from_gpt2(model)
        except ValueError as error:
            raise EvalError(f"checkpoint {name!r} cannot be converted: {error}") from error
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise EvalError(
            f"checkpoint {name!r} has weights that are not finite: its training diverged; take an earlier checkpoint"
        )
    return model


def load_model(name, *, dtype, device, trust_remote_code=False, model_class=None, **fields):
    """
    Args:
        name, trust_remote_code: as for `load_tokenizer`. Modeling code in a folder is run.
        dtype: "float32" or "bfloat16", of the weights, whatever was saved.
        model_class: by default what the checkpoint asks for.
        fields: settings of the config to change.

    Returns:
        the model, on the device.

    Raises:
        EvalError: it cannot be opened, or its weights and its config do not fit.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model, loading = _from_pretrained(
        model_class or AutoModelForCausalLM,
        name,
        trust_remote_code,
        dtype=getattr(torch, dtype),
        use_safetensors=True,  # the other kind of weights is a pickle
        ignore_mismatched_sizes=True,  # looked at below
        output_loading_info=True,
        **fields,
    )
    # transformers fills these with random numbers and goes on
    unfilled = sorted({*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])})
    if unfilled:
        raise EvalError(
            f"checkpoint {name!r}: config.json asks for {len(unfilled)} tensors that the weights lack or "
            f"have in another shape ({unfilled[0]}, ...); use the config.json that was saved with them"
        )
    return model.to(device)


def _from_pretrained(kind, name, trust_remote_code, **options):
    is_local = Path(name).is_dir()
    why = None if is_local else why_unreachable()
    try:
        return kind.from_pretrained(
            name,
            trust_remote_code=is_local or trust_remote_code,
            local_files_only=is_local or why is not None,  # straight to the cache, see why_unreachable
            **options,
        )
    except Exception as error:  # what a broken folder makes transformers raise is of every kind
        if "trust_remote_code" in str(error):
            raise NeedsCodeError(
                f"checkpoint {name!r}: brings its own modeling code; read it, then run it with --trust_remote_code"
            ) from error
        if "use_safetensors" in str(error):
            problem = "no weights as safetensors; pickles (pytorch_model.bin) can run any code and are not opened here"
        elif why is not None and isinstance(error, OSError):
            problem = f"no such folder, nor in the Hub's local cache, and {why}"
        else:
            problem = f"cannot be opened ({type(error).__name__}: {one_line(error)})"
        raise EvalError(f"checkpoint {name!r}: {problem}") from error


def revision(model):
    """The commit of a model from the Hub, whose name alone does not fix the weights; None for a folder."""
    from huggingface_hub import try_to_load_from_cache

    config = None if Path(model).is_dir() else try_to_load_from_cache(model, "config.json")
    return Path(config).parent.name if isinstance(config, str) else None  # snapshots/COMMIT/config.json


def weights_sha256(model):
    """
    What tells a folder's weights, whatever its name: SHA-256 of the SHA-256s of its *.safetensors, in the order of
    their names. None for a model from the Hub, whose revision tells them.

    Raises:
        EvalError: a file cannot be read.
    """
    folder = Path(model)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise EvalError(f"checkpoint {str(model)!r} cannot be read ({error})") from error
    return digest.hexdigest()
