"""Open a checkpoint: a folder or the id of a model on the Hub, with its tokenizer; and choose the device for it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.checkpoints import has_tokenizer, resolve_checkpoint
from common.errors import UserError, one_line
from common.hub import hub_error
from common.weights import weights_problem

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from modeling_gpt2repro import GPT2ReproForCausalLM


class RemoteCodeRequired(UserError):
    """A model on the Hub needs its own modeling code, which the user did not allow."""


def check_name(name: str) -> str:
    """Return the checkpoint that a name means: a step folder for .../checkpoints/best, else the name itself.

    Raises:
        UserError: it is neither a checkpoint's folder nor the id of a model on the Hub.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = resolve_checkpoint(name)
    folder = Path(name)
    try:
        is_folder = folder.is_dir()
        has_config = (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()
    except OSError as error:  # the name is too long, or the folder is not ours
        raise UserError(f"checkpoint {name!r} cannot be opened ({error.strerror}); give another") from error
    if is_folder:
        if has_config:
            problem = weights_problem(folder)
        else:
            inside = sorted([*folder.glob("*/config.json"), *folder.glob("*/*/config.json")])
            hint = f"did you mean {str(inside[-1].parent)!r}?" if inside else "give the folder that holds it"
            problem = f"no config.json, so this is not a checkpoint; {hint}"
        if problem:
            raise UserError(f"checkpoint {name!r}: {problem}")
    elif folder.exists():
        raise UserError(f"checkpoint {name!r} is a file; give the folder it is in")
    else:
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise UserError(f"checkpoint {name!r}: no such folder, nor a Hub id (owner/name)") from error
    return name


def load_tokenizer(
    name: str, *, trust_remote_code: bool | None = False
) -> "tuple[PreTrainedTokenizerBase, PreTrainedConfig]":
    """Return a checkpoint's tokenizer, and the model's config.

    Args:
        name: a checkpoint's folder, or the id of a model on the Hub.
        trust_remote_code: run the code of a model on the Hub. Code in a folder is run, too, unless this is None.

    Raises:
        UserError: the checkpoint cannot be opened, or has no tokenizer.
    """
    from transformers import AutoTokenizer

    # For a folder without tokenizer files, transformers raises an error about formats, or returns an empty tokenizer.
    has_files = not Path(name).is_dir() or has_tokenizer(name)
    tokenizer = from_pretrained(AutoTokenizer, name, trust_remote_code) if has_files else None
    if tokenizer is None or tokenizer.vocab_size == 0:
        raise UserError(f"checkpoint {name!r} has no tokenizer; put one there with tokenizer.save_pretrained")
    return tokenizer, load_config(name, trust_remote_code=trust_remote_code)


def load_config(name: str, *, trust_remote_code: bool | None = False) -> "PreTrainedConfig":
    """Return a checkpoint's config; for arguments and errors see `load_tokenizer`."""
    from transformers import AutoConfig

    return from_pretrained(AutoConfig, name, trust_remote_code)


def load_gpt2_config(name: str, *, vocab_size: int = 0) -> "PreTrainedConfig":
    """Return the config of a GPT-2, this project's or transformers'. No code that comes with it is run.

    Raises:
        UserError: the checkpoint cannot be opened, is not a GPT-2, or has fewer than `vocab_size` tokens.
    """
    import modeling_gpt2repro  # noqa: F401 (registers its config)

    try:
        config = load_config(name, trust_remote_code=None)
        kind = f"is a {config.model_type!r} model"
    except RemoteCodeRequired:
        config, kind = None, "brings its own modeling code"
    if config is None or config.model_type not in ("gpt2", "gpt2repro"):
        raise UserError(f"checkpoint {name!r} {kind}; it must be a GPT-2 ('gpt2' or 'gpt2repro')")
    if config.vocab_size < vocab_size:
        raise UserError(
            f"checkpoint {name!r} has a vocabulary of {config.vocab_size:,} tokens; at least {vocab_size:,} are needed"
        )
    return config


def load_gpt2(name: str, *, vocab_size: int | None = None, **fields: Any) -> "GPT2ReproForCausalLM":
    """Open a GPT-2, this project's or transformers', as this project's model: in float32, on the CPU.

    Args:
        name: as for `load_tokenizer`. This project's code is used, not the code in an older checkpoint's folder.
        vocab_size: keep only so many tokens, the first ones; None keeps all.
        fields: settings of the config to change (embd_pdrop, ...).

    Raises:
        UserError: see `load_gpt2_config`; or the weights are not finite.
    """
    from transformers import GPT2LMHeadModel

    from modeling_gpt2repro import GPT2ReproForCausalLM

    is_gpt2 = load_gpt2_config(name, vocab_size=vocab_size or 0).model_type == "gpt2"
    model_class = GPT2LMHeadModel if is_gpt2 else GPT2ReproForCausalLM
    model: Any = load_model(name, dtype="float32", device="cpu", model_class=model_class, **fields)
    if vocab_size is not None and vocab_size < model.config.vocab_size:
        model = model if is_gpt2 else model.to_gpt2()
        model.resize_token_embeddings(vocab_size)
    if isinstance(model, GPT2LMHeadModel):
        try:
            model = GPT2ReproForCausalLM.from_gpt2(model)
        except ValueError as error:
            raise UserError(f"checkpoint {name!r} cannot be converted: {error}") from error
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise UserError(
            f"checkpoint {name!r} has weights that are not finite: its training diverged; take an earlier checkpoint"
        )
    return model


def load_model(
    name: str,
    *,
    dtype: str,
    device: str,
    trust_remote_code: bool = False,
    model_class: Any = None,
    **fields: Any,
) -> "PreTrainedModel":
    """Open a causal language model on a device.

    Args:
        name, trust_remote_code: as for `load_tokenizer`.
        dtype: "float32" or "bfloat16", of the weights, whatever was saved.
        model_class: by default the one that the checkpoint names.
        fields: settings of the config to change.

    Raises:
        UserError: the checkpoint cannot be opened, or its weights do not match its config.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model, loading = from_pretrained(
        model_class or AutoModelForCausalLM,
        name,
        trust_remote_code,
        dtype=getattr(torch, dtype),
        use_safetensors=True,  # other weights are pickles
        ignore_mismatched_sizes=True,  # checked below
        output_loading_info=True,
        **fields,
    )
    # transformers would fill these with random numbers.
    unfilled = sorted({*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])})
    if unfilled:
        raise UserError(
            f"checkpoint {name!r}: config.json asks for {len(unfilled)} tensors that the weights lack or "
            f"have in another shape ({unfilled[0]}, ...); use the config.json that was saved with them"
        )
    return model.to(device)


def from_pretrained(
    auto_class: Any, name: str, trust_remote_code: bool | None = False, *, kind: str = "checkpoint", **options: Any
) -> Any:
    """Call `auto_class.from_pretrained`, without the network for a folder; `kind` is a word for messages.

    Raises:
        UserError: see `load_tokenizer`.
    """
    is_local = Path(name).is_dir()
    unreachable = None if is_local else hub_error()
    try:
        return auto_class.from_pretrained(
            name,
            trust_remote_code=trust_remote_code or (is_local and trust_remote_code is not None),
            local_files_only=is_local or unreachable is not None,  # read the cache at once, see hub_error
            **options,
        )
    except Exception as error:  # a broken folder makes transformers raise errors of any class
        if "trust_remote_code" in str(error):
            raise RemoteCodeRequired(
                f"{kind} {name!r}: brings its own modeling code; read it, then run it with --trust_remote_code"
            ) from error
        if "use_safetensors" in str(error):
            problem = "no weights as safetensors; pickles (pytorch_model.bin) can run any code and are not opened here"
        elif unreachable is not None and isinstance(error, OSError):
            problem = (
                f"no such folder, nor in the Hub's local cache, and {unreachable}: give a folder, or go online once"
            )
        else:
            problem = f"cannot be opened ({type(error).__name__}: {one_line(error)})"
        raise UserError(f"{kind} {name!r}: {problem}") from error


def revision(name: str) -> str | None:
    """Return the commit of a model from the Hub, whose weights can change; None for a folder."""
    from huggingface_hub import try_to_load_from_cache

    config = None if Path(name).is_dir() else try_to_load_from_cache(name, "config.json")
    return Path(config).parent.name if isinstance(config, str) else None  # snapshots/COMMIT/config.json


def find_device(name: str | None) -> str:
    """Return the device to run on: `name`, or by default the first available of cuda, mps and cpu.

    Raises:
        UserError: the device is not available.
    """
    if name is None:
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} is not available ({one_line(error)}); try --device cpu") from error
    return name
