"""
Checkpoints: `checkpoints/step_000100/`, a Hugging Face model folder plus `training_state/`.

    config.json, model.safetensors, tokenizer.json, ...   what from_pretrained opens
    training_state/state.json                             step, seed, batch and data the step number refers to
    training_state/optimizer.safetensors                  AdamW's moments, by parameter name
    training_state/rng_00000.safetensors                  random state, one file a process

A folder is written under another name and renamed when it is whole, so one that is there is complete.
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from training import TrainingError

_STEP_FOLDER = re.compile(r"step_(\d{6,})")


def checkpoint_folder(output_dir, step):
    """runs/x, 100 -> runs/x/checkpoints/step_000100"""
    return Path(output_dir) / "checkpoints" / f"step_{step:06d}"


def save_checkpoint(folder, *, accelerator, model, tokenizer, optimizer, state):
    """
    Writes a checkpoint. Every process calls it.

    Args:
        folder: where it shall be; an older one of the same step is replaced.
        model: the bare PreTrainedModel, neither compiled nor wrapped.
        tokenizer: a Hugging Face tokenizer.
        optimizer: its state is saved under the parameters' names.
        state: JSON-able dict, with "step" at least.

    Raises:
        TrainingError: the disk would not take it; what was there before is untouched.
    """
    folder = Path(folder)
    aside = folder.with_name(f".{folder.name}.partial")
    try:
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            (aside / "training_state").mkdir(parents=True)
        accelerator.wait_for_everyone()
        rng_file = aside / "training_state" / f"rng_{accelerator.process_index:05d}.safetensors"
        save_file(_rng_state(accelerator.device), rng_file)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            save_file(_optimizer_tensors(model, optimizer), aside / "training_state" / "optimizer.safetensors")
            (aside / "training_state" / "state.json").write_text(json.dumps(state, indent=2) + "\n")
            for path in aside.rglob("*"):
                _flush_to_disk(path)
            if folder.exists():  # the same step again, after resuming from an earlier one
                replaced = folder.with_name(f".{folder.name}.replaced")
                folder.rename(replaced)
                aside.rename(folder)
                shutil.rmtree(replaced)
            else:
                aside.rename(folder)
            _flush_to_disk(folder.parent)
    except (OSError, SafetensorError) as error:  # a full disk is an OSError here and a SafetensorError there
        shutil.rmtree(aside, ignore_errors=True)
        raise TrainingError(
            f"could not write the checkpoint {folder}: {error}. Earlier checkpoints are whole; make room "
            "and go on with --resume auto"
        ) from error
    accelerator.wait_for_everyone()


def find_checkpoint(resume, output_dir):
    """
    Args:
        resume: None, "auto" or the path of a checkpoint.

    Returns:
        Path, or None for a fresh start ("auto" with no checkpoint there, or None).

    Raises:
        TrainingError: the path is no checkpoint; or a fresh start would overwrite a finished part of a run.
    """
    newest = _newest(output_dir)
    if resume is None:
        if newest is not None:
            raise TrainingError(
                f"{output_dir} already holds a run with the checkpoint {newest.name}: go on from it with "
                "--resume auto, choose another --output_dir, or remove the folder"
            )
        return None
    if resume == "auto":
        return newest
    folder = Path(resume)
    if not (folder / "training_state" / "state.json").is_file():
        raise TrainingError(f"--resume {resume}: no training_state/state.json there, so no checkpoint of train.py")
    return folder


def _newest(output_dir):
    folders = [
        path
        for path in (Path(output_dir) / "checkpoints").glob("step_*")
        if _STEP_FOLDER.fullmatch(path.name) and (path / "training_state" / "state.json").is_file()
    ]
    return max(folders, key=lambda path: int(_STEP_FOLDER.fullmatch(path.name)[1]), default=None)


def load_state(folder, must_match):
    """
    The state.json of a checkpoint, refused where the run to go on would not be the run that was saved.

    Args:
        must_match: dict, what the step number and the data order depend on (seed, batch, data).

    Raises:
        TrainingError: the file cannot be read, or a value differs.
    """
    path = Path(folder) / "training_state" / "state.json"
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path} cannot be read ({error}); resume from another checkpoint") from error
    for key, value in must_match.items():
        if state.get(key) != value:
            raise TrainingError(
                f"cannot resume from {folder}: it was trained with {key}={state.get(key)}, this run has {value}. "
                "Resume with the same setting, or start afresh in another --output_dir"
            )
    return state


def load_optimizer(folder, model, optimizer):
    """Gives AdamW the moments it had, matched by parameter name. Raises TrainingError where they do not fit."""
    path = Path(folder) / "training_state" / "optimizer.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path} cannot be read ({error}); resume from another checkpoint") from error
    index_of = _parameter_indices(optimizer)
    state = {}
    for name, parameter in model.named_parameters():
        entry = {key: tensors.pop(f"{key}.{name}", None) for key in ("step", "exp_avg", "exp_avg_sq")}
        if any(v is None for v in entry.values()) or entry["exp_avg"].shape != parameter.shape:
            raise TrainingError(f"{path} has no fitting moments for {name} {tuple(parameter.shape)}")
        state[index_of[parameter]] = entry
    if tensors:
        raise TrainingError(f"{path} has moments of parameters the model lacks, for example {min(tensors)}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def load_rng(folder, process_index, device):
    """Restores this process's random state; False where the saved run had fewer processes than this one."""
    path = Path(folder) / "training_state" / f"rng_{process_index:05d}.safetensors"
    if not path.is_file():
        return False
    tensors = load_file(path)
    torch.set_rng_state(tensors["cpu"])
    if device.type in tensors and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(tensors[device.type])
    return True


def _rng_state(device):
    tensors = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        tensors[device.type] = torch.get_device_module(device).get_rng_state()
    return tensors


def _optimizer_tensors(model, optimizer):
    """{"exp_avg.transformer.wte.weight": ..., "step.transformer.wte.weight": ..., ...}"""
    return {
        f"{key}.{name}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def _parameter_indices(optimizer):
    """Parameter -> its number in optimizer.state_dict()."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {p: index for index, p in enumerate(parameters)}


def _flush_to_disk(path):
    # Windows cannot fsync a folder; its rename is already durable enough.
    with contextlib.suppress(PermissionError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
