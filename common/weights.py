"""Check and identify a folder's weights without loading them."""

import hashlib
from pathlib import Path

from safetensors import SafetensorError, safe_open

from common.errors import UserError
from common.files import read_json

_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


def weights_problem(folder: str | Path) -> str | None:
    """Return what is wrong with the weights in a folder, and what to do about it; None if every file is complete.

    Weights that are pickles (pytorch_model.bin) are never opened, since opening one can run any code.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    if (folder / "adapter_config.json").is_file() and not any(path.name.startswith("model") for path in files):
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path", "unknown")
        return (
            f"a PEFT adapter of {base!r}, not a complete model: merge it first, "
            "PeftModel.from_pretrained(base, FOLDER).merge_and_unload().save_pretrained(NEW_FOLDER)"
        )
    if not files:
        if pickles := sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern)):
            return (
                f"the weights are in {pickles[0]}, a pickle, which can run any code when it is opened, so it is not "
                "opened here. If you trust it, convert it: "
                "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
            )
        return "no weights (*.safetensors) in it: give the folder that holds them"
    for path in files:
        try:
            with safe_open(path, framework="numpy"):  # compares the header with the file's size
                pass
        except (OSError, SafetensorError) as error:
            return (
                f"{path.name} is damaged or incomplete ({error}): copy or download it again, or take another checkpoint"
            )
    return None


def weights_sha256(checkpoint: str | Path) -> str | None:
    """Return a hash of a folder's weights that does not depend on its name; None for a model on the Hub.

    It is the SHA-256 of the SHA-256s of the *.safetensors files, in the order of their names.

    Raises:
        UserError: a file cannot be read.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise UserError(f"checkpoint {str(checkpoint)!r} cannot be read ({error})") from error
    return digest.hexdigest()
