"""
Checkpoints: `checkpoints/step_000100/`, a Hugging Face model folder plus `training_state/`.

    config.json, model.safetensors, tokenizer.json, ...   for from_pretrained
    training_state/state.json                             step, validation loss, and the settings that step numbers need
    training_state/optimizer.safetensors                  the optimizer's moments by parameter name
    training_state/rng.safetensors                        random state of each process
    training_state/manifest.json                          size and SHA-256 of each file above, written last

A folder is written under another name, flushed to the disk, and renamed when it is complete. So a folder `step_...` is
complete whenever the process is killed; the manifest detects later damage. `checkpoints/best` is a name for the
checkpoint with the lowest validation loss: see common/checkpoints.py.
"""

import json
import re
import shutil
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.checkpoints import BEST, best_of, describe_file, find_damage, list_checkpoints, resolve_checkpoint
from common.files import apply_umask, flush_to_disk, write_json
from training import TrainingError
from training.sharding import full_state_dict, load_moments, load_params, meta_copy

if TYPE_CHECKING:
    from modeling_gpt2repro import GPT2ReproForCausalLM

_LEFTOVER = re.compile(r"\.(step_\d{6,})\.(partial|replaced)")
# Tokenizer, configuration, code, and the disk's rounding up.
_SMALL_FILES_BYTES = 16 * 2**20
# Keys of the resume fingerprint that describe the data, and the settings behind other keys.
_DATA_KEYS = ("train_tokens", "train_sha256")
_SETTINGS = {
    "tokens_per_step": "batch.tokens_per_step",
    "seq_len": "batch.seq_len",
    "order": "data.order",
    "boundary": "data.boundary",
}


class SaveError(TrainingError):
    """A checkpoint could not be written. Earlier checkpoints are complete."""


def checkpoint_folder(output_dir: str | Path, step: int) -> Path:
    """Return runs/x/checkpoints/step_000100 for runs/x and 100."""
    return Path(output_dir) / "checkpoints" / f"step_{step:06d}"


def run_folder_of(checkpoint: str | Path, output_dir: str | Path) -> Path:
    """Return the run's folder of a checkpoint: `output_dir` if its checkpoints are there, also through a link."""
    checkpoints = Path(checkpoint).resolve().parent
    is_own = checkpoints == (Path(output_dir) / "checkpoints").resolve()
    return Path(output_dir) if is_own else checkpoints.parent


class CheckpointWriter:
    """
    Writes checkpoints and removes old ones.

    On a GPU, training waits only while the state is copied to the host's memory; a thread hashes and writes it, one
    checkpoint at a time.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        accelerator: Accelerator,
        model: "GPT2ReproForCausalLM",
        tokenizer: Any,
        keep_last: int | None = None,
        keep_every: int | None = None,
        keep_best: bool = True,
        in_background: bool | None = None,
        warn: Callable[[str], object] = print,
    ):
        """
        Args:
            output_dir: the run's folder.
            model: the bare model, before `accelerator.prepare` changes its class.
            tokenizer: a tokenizer of transformers, saved with each checkpoint.
            keep_last: number of newest checkpoints to keep; None keeps all.
            keep_every: also keep checkpoints of steps that are multiples of it.
            keep_best: also keep the checkpoint with the lowest validation loss.
            in_background: write in a thread; None: unless on a CPU.
            warn: called with a line if a checkpoint is complete but old ones could not be removed.
        """
        self.output_dir, self.accelerator, self.tokenizer = Path(output_dir), accelerator, tokenizer
        self._warn = warn
        self.keep_last, self.keep_every, self.keep_best = keep_last, keep_every, keep_best
        self._meta_model = meta_copy(model)  # saved by the thread, instead of the model that is being trained
        # On a CPU, the thread would compete with training, and the copies would take memory for nothing.
        self._in_background = accelerator.device.type != "cpu" if in_background is None else in_background
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: futures.Future[Path] | None = None
        self._has_warned_of_best = False

    def save(self, model: "GPT2ReproForCausalLM", optimizer: AcceleratedOptimizer, state: dict[str, Any]) -> None:
        """
        Write a checkpoint, or start to. Every process must call this; the main process writes.

        `poll` returns the result, and must have returned the previous one.

        Args:
            model: the bare model, its parameters as they are in training.
            optimizer: the wrapped optimizer.
            state: for state.json, with "step" and "val_loss" (None if unknown) at least.
        """
        assert self._pending is None, "the state would be in memory twice, and a result would be lost"
        accelerator = self.accelerator
        tensors, moments = full_state_dict(model, optimizer, accelerator, copy=self._in_background)
        rng = gather_object([_rng_state(accelerator.device)])
        if accelerator.is_main_process:
            rng = {f"{rank}.{name}": tensor for rank, states in enumerate(rng) for name, tensor in states.items()}
            self._pending = self._thread.submit(self._write, tensors, moments, rng, state)
            if not self._in_background:
                futures.wait([self._pending])

    def poll(self, wait: bool = False) -> Path | None:
        """
        Return the folder of a checkpoint that was completed since the last call, or None.

        Args:
            wait: wait for the checkpoint that is being written.

        Raises:
            SaveError: the checkpoint could not be written.
        """
        if self._pending is None or not (wait or self._pending.done()):
            return None
        pending, self._pending = self._pending, None
        return pending.result()

    def close(self) -> None:
        """Wait for the checkpoint that is being written, whose error `poll` raises, and end the thread."""
        self._thread.shutdown()

    def _write(
        self,
        tensors: dict[str, torch.Tensor],
        moments: dict[str, torch.Tensor],
        rng: dict[str, torch.Tensor],
        state: dict[str, Any],
    ) -> Path:
        folder = checkpoint_folder(self.output_dir, state["step"])
        tmp_folder = folder.with_name(f".{folder.name}.partial")
        needed = sum(t.nbytes for t in (*tensors.values(), *moments.values())) + _SMALL_FILES_BYTES
        try:
            shutil.rmtree(tmp_folder, ignore_errors=True)
            (tmp_folder / "training_state").mkdir(parents=True)
            free = shutil.disk_usage(tmp_folder).free
            if free < needed:
                raise OSError(f"the disk has {free / 1e9:.2f} GB left")
            load_params(self._meta_model, tensors).save_pretrained(tmp_folder)
            try:
                self.tokenizer.save_pretrained(tmp_folder)
            except Exception as error:  # the tokenizers package has no class for a full disk
                raise OSError(str(error)) from error
            save_file(moments, tmp_folder / "training_state" / "optimizer.safetensors")
            save_file(rng, tmp_folder / "training_state" / "rng.safetensors")
            write_json(tmp_folder / "training_state" / "state.json", state)
            apply_umask(tmp_folder)
            files = sorted(path for path in tmp_folder.rglob("*") if path.is_file())
            for path in files:
                flush_to_disk(path)
            write_json(
                tmp_folder / "training_state" / "manifest.json",
                {"files": {path.relative_to(tmp_folder).as_posix(): describe_file(path) for path in files}},
            )
            flush_to_disk(tmp_folder / "training_state")
            flush_to_disk(tmp_folder)
            if folder.exists():  # the same step as before, after resuming from an earlier one
                replaced = folder.with_name(f".{folder.name}.replaced")
                folder.rename(replaced)
                tmp_folder.rename(folder)
                shutil.rmtree(replaced)
            else:
                tmp_folder.rename(folder)
            flush_to_disk(folder.parent)
        except (OSError, SafetensorError) as error:  # safetensors raises its own error for a full disk
            shutil.rmtree(tmp_folder, ignore_errors=True)
            raise SaveError(
                f"could not write the checkpoint {folder}: {error}. It needs {needed / 1e9:.2f} GB: make room on the "
                "disk, or lower keep_last. Earlier checkpoints are complete"
            ) from error
        finally:
            self._meta_model.to("meta")  # frees the copies
        try:
            self._remove_old(state["step"])
        except OSError as error:
            self._warn(f"warning: {folder} is complete, but old checkpoints could not be removed ({error})")
        return folder

    def _remove_old(self, step: int) -> None:
        """Remove old checkpoints. Decided by the folders on the disk alone, so that a crash in between is harmless."""
        self._remove_link()
        # A run that was resumed from an earlier step leaves later checkpoints alone until it reaches them.
        checkpoints = [c for c in list_checkpoints(self.output_dir / "checkpoints") if c.step <= step]
        kept = {c.step for c in checkpoints}
        if self.keep_last is not None:
            kept = {s for s in kept if self.keep_every and s % self.keep_every == 0}
            kept.update(c.step for c in checkpoints[-self.keep_last :])
        best = best_of(checkpoints)
        if self.keep_best and best is not None:
            kept.add(best.step)
        for checkpoint in checkpoints:
            if checkpoint.step not in kept:
                # Renamed first: a partly removed folder must not look like a checkpoint.
                removed = checkpoint.folder.with_name(f".{checkpoint.folder.name}.partial")
                checkpoint.folder.rename(removed)
                shutil.rmtree(removed, ignore_errors=True)

    def _remove_link(self) -> None:
        """Remove the link `best` of earlier versions. A copy of the link's target stays, with one warning."""
        path = self.output_dir / "checkpoints" / BEST
        if path.is_symlink():
            path.unlink()
        elif path.is_dir() and not self._has_warned_of_best:
            self._has_warned_of_best = True
            self._warn(
                f"warning: the folder {path} is an old copy and is left alone; as a checkpoint's name, {path} means "
                "the step folder with the lowest validation loss. Remove or rename the copy"
            )


def remove_leftovers(output_dir: str | Path) -> None:
    """Remove what a killed process left behind while saving. No other process may write to the folder."""
    for path in (Path(output_dir) / "checkpoints").glob(".step_*"):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        folder = path.with_name(match[1])
        if match[2] == "replaced" and not folder.exists():  # killed between the two renames
            path.rename(folder)
        else:
            shutil.rmtree(path)


def check_start(resume: str | None, output_dir: str | Path, say: Callable[[str], object]) -> Path | None:
    """
    Refuse a start that cannot succeed, without reading the checkpoints.

    Args:
        resume: None, "auto" or the path of a checkpoint.
        say: called with a line if the path is `best`.

    Returns:
        The checkpoint that `resume` names; None for "auto" and for a fresh start.

    Raises:
        TrainingError: the path is not a checkpoint; or the folder already has a run, and this is a fresh start or one
            from somewhere else or from an earlier step.
        UserError: the path is a run's folder.
    """
    checkpoints = list_checkpoints(Path(output_dir) / "checkpoints")
    if resume == "auto":
        return None
    newest = checkpoints[-1].folder if checkpoints else None
    if resume is None:
        if newest is not None:
            raise TrainingError(
                f"{output_dir} already holds a run with the checkpoint {newest.name}: resume it with --resume auto, "
                "choose another --output_dir, or remove the folder"
            )
        return None
    folder = Path(resolve_checkpoint(resume, say))
    if not (folder / "training_state" / "state.json").is_file():
        raise TrainingError(f"--resume {resume}: not a checkpoint of train.py, training_state/state.json is missing")
    # The new checkpoints would mix with another branch's, and --resume auto would later take the wrong one.
    if newest is not None and folder.resolve() != newest.resolve():
        raise TrainingError(
            f"--resume {resume}: {output_dir} also holds {newest.name}, from which --resume auto would resume; choose "
            "another --output_dir for the new branch, or remove the later checkpoints"
        )
    return folder


def find_checkpoint(resume: str | None, output_dir: str | Path, say: Callable[[str], object]) -> Path | None:
    """
    Find the checkpoint to resume from, and check every byte of it.

    Args:
        resume: None, "auto" or the path of a checkpoint.
        say: called with a line about each damaged checkpoint that is skipped.

    Returns:
        The checkpoint's folder; None for a fresh start (None, or "auto" without any checkpoint).

    Raises:
        TrainingError: as `check_start`; the checkpoint is damaged; or "auto", and all checkpoints are damaged.
    """
    folder = check_start(resume, output_dir, say)
    if folder is not None and (damage := find_damage(folder)):
        raise TrainingError(f"--resume {resume}: {damage}; resume from another checkpoint, or with --resume auto")
    if resume != "auto":
        return folder
    checkpoints = list_checkpoints(Path(output_dir) / "checkpoints")
    for checkpoint in reversed(checkpoints):
        damage = find_damage(checkpoint.folder)
        if damage is None:
            return checkpoint.folder
        say(f"resume    passing over {checkpoint.folder}: {damage}")
    if checkpoints:
        raise TrainingError(
            f"every checkpoint in {output_dir} is damaged: choose another --output_dir for a fresh start, or restore "
            "a checkpoint"
        )
    return None


def load_state(folder: str | Path, resume_fingerprint: dict[str, Any]) -> dict[str, Any]:
    """
    Return a checkpoint's state.json if this run continues the run that was saved.

    Args:
        resume_fingerprint: settings that step numbers and the order of the data depend on.

    Raises:
        TrainingError: the file cannot be read, or a value of the fingerprint differs.
    """
    path = Path(folder) / "training_state" / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{path} cannot be read ({error}). With several machines, output_dir must be on a disk that all of them "
            "share"
        ) from error
    for key, value in resume_fingerprint.items():
        if state.get(key) == value:
            continue
        new_run = f"or start a new run from its weights: --init_from {folder} and another --output_dir"
        if key in _DATA_KEYS:
            raise TrainingError(
                f"cannot resume from {folder}: it was trained on other data ({key}: {state.get(key)} then, {value} "
                f"now). Resume with its data.path, {new_run}"
            )
        raise TrainingError(
            f"cannot resume from {folder}: it was trained with {_SETTINGS.get(key, key)}={state.get(key)}, this run "
            f"has {value}. Resume with the same setting, {new_run}"
        )
    return state


def load_optimizer(
    folder: str | Path, model: "GPT2ReproForCausalLM", optimizer: AcceleratedOptimizer, device: torch.device
) -> None:
    """
    Load the optimizer's moments by parameter name.

    Raises:
        TrainingError: they cannot be read, or do not fit the optimizer.
    """
    path = Path(folder) / "training_state" / "optimizer.safetensors"
    new_run = f"or start a new run from its weights: --init_from {folder}"
    try:
        tensors = load_file(path)
        if device.type == "cpu":  # otherwise they stay mapped from the file, see copy_from_file
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        load_moments(tensors, model, optimizer)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path} cannot be read ({error}); resume from another checkpoint, {new_run}") from error
    except ValueError as error:
        raise TrainingError(
            f"{path} does not fit ({error}); resume with the optim.muon_lr (or none) it was saved with, {new_run}"
        ) from error


def load_rng(folder: str | Path, rank: int, device: torch.device) -> None:
    """Restore this process's random state, if the saved run had a process of this rank."""
    tensors = load_file(Path(folder) / "training_state" / "rng.safetensors")
    if f"{rank}.cpu" in tensors:
        torch.set_rng_state(tensors[f"{rank}.cpu"])
    if f"{rank}.{device.type}" in tensors and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(tensors[f"{rank}.{device.type}"])


def _rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    tensors = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        tensors[device.type] = torch.get_device_module(device).get_rng_state()
    return tensors
