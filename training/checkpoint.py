"""Checkpoints: `checkpoints/step_000100/`, a Hugging Face model folder plus `training_state/`.

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
import math
import re
import shutil
from concurrent import futures
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.checkpoints import BEST, best_of, describe_file, find_damage, list_checkpoints, resolve_checkpoint
from common.cli import say
from common.files import apply_umask, flush_to_disk, write_json
from training import TrainingError
from training.sharding import TrainingModels, full_state_dict, load_moments, load_params, meta_copy

_LEFTOVER = re.compile(r"\.(step_\d{6,})\.(partial|replaced)")
# Tokenizer, configuration, code, and the disk's rounding up.
_SMALL_FILES_BYTES = 16 * 2**20
# Keys of the resume fingerprint that describe the data, and the settings behind other keys.
_DATA_KEYS = ("tokenizer", "train_tokens", "train_sha256")
_SETTINGS = {
    "tokens_per_step": "batch.tokens_per_step",
    "seq_len": "batch.seq_len",
    "seq_len_warmup": "batch.seq_len_warmup * max_steps",
    "order": "data.order",
    "boundary": "data.boundary",
    "mix_weights": "the weights of data.mix",
}


@dataclass(kw_only=True)
class LoopState:
    """State of the training loop, which each checkpoint has in state.json."""

    step: int = 0
    """optimizer steps taken, skipped ones included"""
    num_skipped: int = 0
    """steps skipped because the loss or the gradient was not finite"""
    consecutive_skips: int = 0
    evaluated: bool = False
    """True if `val_loss` is that of this step"""
    val_loss: float | None = None
    """None before the first evaluation, and where a saved loss was not finite"""
    micro_batch_size: int | None = None
    """sequences in a forward pass of a process; None in checkpoints before 2026-12"""
    num_processes: int | None = None
    """that share a step; None in checkpoints before 2026-12"""
    saved: bool = False
    """True once a checkpoint of this step is written, or being written, in the run's folder"""

    @property
    def has_diverged(self) -> bool:
        """True if the validation loss is not a finite number."""
        return self.val_loss is None or not math.isfinite(self.val_loss)

    def advance(self, is_finite: bool) -> None:
        """Count a step; one that is not finite was skipped."""
        self.step += 1
        self.evaluated = self.saved = False
        self.num_skipped += not is_finite
        self.consecutive_skips = 0 if is_finite else self.consecutive_skips + 1


def checkpoint_folder(output_dir: str | Path, step: int) -> Path:
    """Return runs/x/checkpoints/step_000100 for runs/x and 100."""
    return Path(output_dir) / "checkpoints" / f"step_{step:06d}"


def run_folder_of(checkpoint: str | Path, output_dir: str | Path) -> Path:
    """Return the run's folder of a checkpoint: `output_dir` if its checkpoints are there, also through a link."""
    checkpoints = Path(checkpoint).resolve().parent
    is_own = checkpoints == (Path(output_dir) / "checkpoints").resolve()
    return Path(output_dir) if is_own else checkpoints.parent


class CheckpointWriter:
    """Writes checkpoints and removes old ones.

    On a GPU, training waits only while the state is copied to the host's memory; a thread hashes and writes it, one
    checkpoint at a time.

    Args:
        tokenizer: a tokenizer of transformers, saved with each checkpoint.
        fingerprint: the settings that define what a step is, which `load_state` compares.
        keep_last: number of newest checkpoints that stay on the disk; None: all.
        keep_every: those of steps that are multiples of it stay, too.
        keep_best: the one with the lowest validation loss stays, too.
        in_background: write in a thread; None: unless on a CPU.
    """

    def __init__(
        self,
        output_dir: str | Path,
        accelerator: Accelerator,
        models: TrainingModels,
        tokenizer: Any,
        fingerprint: dict[str, Any],
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        keep_best: bool = True,
        in_background: bool | None = None,
    ) -> None:
        self.output_dir, self.accelerator, self.tokenizer = Path(output_dir), accelerator, tokenizer
        self._models, self._fingerprint = models, fingerprint
        self._keep_last, self._keep_every, self._keep_best = keep_last, keep_every, keep_best
        # On a CPU, the thread would compete with training, and the copies would take memory for nothing.
        self._in_background = accelerator.device.type != "cpu" if in_background is None else in_background
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: futures.Future[Path] | None = None

    def save(self, state: LoopState) -> None:
        """Write a checkpoint, or start to. Every process must call this; the main process writes.

        Waits for the previous checkpoint: at most one is in memory.
        """
        self.report_if_done(wait=True)
        state.saved = True
        accelerator = self.accelerator
        tensors, moments = full_state_dict(
            self._models.bare, self._models.optimizer, accelerator, copy=self._in_background
        )
        device, rng_state = accelerator.device, {"cpu": torch.get_rng_state()}
        if device.type != "cpu":
            rng_state[device.type] = torch.get_device_module(device).get_rng_state()
        rng = gather_object([rng_state])
        if accelerator.is_main_process:
            rng = {f"{rank}.{name}": tensor for rank, states in enumerate(rng) for name, tensor in states.items()}
            saved = asdict(state) | {"val_loss": state.val_loss if state.evaluated else None} | self._fingerprint
            saved["tokens"] = state.step * self._fingerprint["tokens_per_step"]
            if accelerator.scaler is not None:  # fp16
                saved["loss_scaler"] = accelerator.scaler.state_dict()
            del saved["saved"]
            self._pending = self._thread.submit(self._write, tensors, moments, rng, saved)
            if not self._in_background:
                futures.wait([self._pending])

    def report_if_done(self, *, wait: bool = False) -> None:
        """Print a line if a checkpoint was completed since the last call, or a warning if it could not be written."""
        try:
            if wait or (self._pending is not None and self._pending.done()):
                self.finish()
        except TrainingError as error:
            say(f"warning: {error}. Training continues")

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and print a line when it is complete.

        Raises:
            TrainingError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            say(f"saved     {pending.result()}")

    def close(self) -> None:
        """Wait for the checkpoint that is being written, whose error `finish` raises, and end the thread."""
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
            # Not the model itself: the thread must not save what is being trained.
            load_params(meta_copy(self._models.bare), tensors).save_pretrained(save_directory=tmp_folder)
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
            raise TrainingError(
                f"could not write the checkpoint {folder}: {error}. It needs {needed / 1e9:.2f} GB: make room on the "
                "disk, or lower keep_last. Earlier checkpoints are complete"
            ) from error
        try:
            self._remove_old(state["step"])
        except OSError as error:
            say(f"warning: {folder} is complete, but old checkpoints could not be removed ({error})")
        return folder

    def _remove_old(self, step: int) -> None:
        """Remove old checkpoints. Decided by the folders on the disk alone, so that a crash in between is harmless."""
        link = self.output_dir / "checkpoints" / BEST  # of earlier versions; a copy of its target stays, and is ignored
        if link.is_symlink():
            link.unlink()
        # A run that was resumed from an earlier step leaves later checkpoints alone until it reaches them.
        checkpoints = [c for c in list_checkpoints(self.output_dir / "checkpoints") if c.step <= step]
        kept = {c.step for c in checkpoints}
        if self._keep_last is not None:
            kept = {s for s in kept if self._keep_every and s % self._keep_every == 0}
            kept.update(c.step for c in checkpoints[-self._keep_last :])
        best = best_of(checkpoints)
        if self._keep_best and best is not None:
            kept.add(best.step)
        for checkpoint in checkpoints:
            if checkpoint.step not in kept:
                # Renamed first: a partly removed folder must not look like a checkpoint.
                removed = checkpoint.folder.with_name(f".{checkpoint.folder.name}.partial")
                checkpoint.folder.rename(removed)
                shutil.rmtree(removed, ignore_errors=True)


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


def check_start(resume: str | None, output_dir: str | Path) -> Path | None:
    """Refuse a start that cannot succeed, without reading the checkpoints.

    Returns:
        The checkpoint whose path `resume` is; None for "auto" and for a fresh start (None).

    Raises:
        UserError: the path is not a checkpoint; or the folder already has a run, and this is a fresh start or one from
            somewhere else or from an earlier step.
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
    folder = Path(resolve_checkpoint(resume))
    if not (folder / "training_state" / "state.json").is_file():
        raise TrainingError(f"--resume {resume}: not a checkpoint of train.py, training_state/state.json is missing")
    # The new checkpoints would mix with another branch's, and --resume auto would later take the wrong one.
    if newest is not None and folder.resolve() != newest.resolve():
        raise TrainingError(
            f"--resume {resume}: {output_dir} also holds {newest.name}, from which --resume auto would resume; choose "
            "another --output_dir for the new branch, or remove the later checkpoints"
        )
    return folder


def find_checkpoint(resume: str | None, output_dir: str | Path) -> Path | None:
    """Find the checkpoint to resume from, and check every byte of it. Print a line about each damaged one it skips.

    Args:
        resume: "auto", the path of a checkpoint, or None for a fresh start.

    Returns:
        The checkpoint's folder; None for a fresh start, also by "auto" without any checkpoint.

    Raises:
        UserError: as `check_start`; the checkpoint is damaged; or "auto", and all checkpoints are damaged.
    """
    folder = check_start(resume, output_dir)
    if resume != "auto":
        if folder is not None and (damage := find_damage(folder)):
            raise TrainingError(f"--resume {resume}: {damage}; resume from another checkpoint, or with --resume auto")
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


def load_state(folder: str | Path, fingerprint: dict[str, Any], output_dir: str | Path) -> LoopState:
    """Return a checkpoint's loop state.

    Args:
        output_dir: this run's folder, which may be another one than the checkpoint's.

    Raises:
        TrainingError: the fingerprint differs from the saved run's.
    """
    path = Path(folder) / "training_state" / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{path} cannot be read ({error}). With several machines, output_dir must be on a disk that all of them "
            "share"
        ) from error
    for key, value in fingerprint.items():
        if state.get(key) == value:
            continue
        new_run = f"or start a new run from its weights: --init_from {folder} and another --output_dir"
        if key in _DATA_KEYS:
            raise TrainingError(
                f"cannot resume from {folder}: it was trained on other data ({key}: {state.get(key)} then, {value} "
                f"now). Resume with its data.path or data.mix, {new_run}"
            )
        raise TrainingError(
            f"cannot resume from {folder}: it was trained with {_SETTINGS.get(key, key)}={state.get(key)}, this run "
            f"has {value}. Resume with the same setting, {new_run}"
        )
    state.setdefault("consecutive_skips", state.get("skipped_in_a_row"))  # the name in checkpoints before 2026-11-27
    state["saved"] = Path(folder).resolve() == checkpoint_folder(output_dir, state["step"]).resolve()
    say(f"resume    from {folder}, step {state['step']:,}")
    return LoopState(**{field.name: state[field.name] for field in fields(LoopState) if field.name in state})


def load_training_state(folder: str | Path, models: TrainingModels, accelerator: Accelerator) -> None:
    """Load the optimizer's moments by parameter name, fp16's loss scale, and this rank's random state."""
    device, rank = accelerator.device, accelerator.process_index
    path = Path(folder) / "training_state" / "optimizer.safetensors"
    new_run = f"or start a new run from its weights: --init_from {folder}"
    try:
        tensors = load_file(path)
        if device.type == "cpu":  # otherwise they stay mapped from the file, see copy_from_file
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        load_moments(tensors, models.bare, models.optimizer)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path} cannot be read ({error}); resume from another checkpoint, {new_run}") from error
    except ValueError as error:
        raise TrainingError(
            f"{path} does not fit ({error}); resume with the optim.muon_lr (or none) it was saved with, {new_run}"
        ) from error
    if accelerator.scaler is not None:
        state = json.loads((Path(folder) / "training_state" / "state.json").read_text(encoding="utf-8"))
        if "loss_scaler" in state:  # not if the run was in another precision until now
            accelerator.scaler.load_state_dict(state["loss_scaler"])
    rng = load_file(Path(folder) / "training_state" / "rng.safetensors")
    if f"{rank}.cpu" in rng:
        torch.set_rng_state(rng[f"{rank}.cpu"])
    if f"{rank}.{device.type}" in rng and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(rng[f"{rank}.{device.type}"])
