"""
Checkpoints: `checkpoints/step_000100/`, a Hugging Face model folder plus `training_state/`.

    config.json, model.safetensors, tokenizer.json, ...   what from_pretrained opens
    training_state/state.json                             step, validation loss, and what the step number refers to
    training_state/optimizer.safetensors                  the optimizer's moments, by parameter name
    training_state/rng.safetensors                        random state of each process
    training_state/manifest.json                          size and SHA-256 of each file above, written last

A folder is written under another name, flushed to the disk, and renamed when it is whole. So whatever is killed when, a
folder `step_...` is a whole one, unless the disk or somebody changed it since; that the manifest tells.
The checkpoint with the lowest validation loss has a name besides, `checkpoints/best`: see common/checkpoints.py.
"""

import json
import re
import shutil
from concurrent import futures
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.checkpoints import BEST, best_of, describe_file, find_damage, list_checkpoints, resolve_checkpoint
from common.files import apply_umask, flush_to_disk, write_json
from training import TrainingError
from training.sharding import full_state_dict, load_moments, load_params, meta_copy

_LEFT_OVER = re.compile(r"\.(step_\d{6,})\.(partial|replaced)")
# Files beside the tensors (tokenizer, configuration, code), and the disk's own rounding up.
_SMALL_FILES_BYTES = 16 * 2**20


# What `must_match` in `load_state` has of the data, and the settings that its other keys stand for.
_DATA_KEYS = ("train_tokens", "train_sha256")
_SETTING_OF = {
    "tokens_per_step": "batch.tokens_per_step",
    "seq_len": "batch.seq_len",
    "order": "data.order",
    "boundary": "data.boundary",
}


class SaveError(TrainingError):
    """A checkpoint could not be written; the ones before it are whole."""


def checkpoint_folder(output_dir, step):
    """runs/x, 100 -> runs/x/checkpoints/step_000100"""
    return Path(output_dir) / "checkpoints" / f"step_{step:06d}"


def run_folder_of(checkpoint, output_dir):
    """The folder of the run that a checkpoint is of: `output_dir` where it lies there, on whatever disk that is."""
    checkpoints = Path(checkpoint).resolve().parent
    is_own = checkpoints == (Path(output_dir) / "checkpoints").resolve()
    return Path(output_dir) if is_own else checkpoints.parent


class CheckpointWriter:
    """
    Writes checkpoints and removes old ones. On a GPU, training waits only while the state is copied to the host's
    memory; hashing and writing it is the work of a thread, one checkpoint at a time.
    """

    def __init__(
        self,
        output_dir,
        *,
        accelerator,
        model,
        tokenizer,
        keep_last=None,
        keep_every=None,
        keep_best=True,
        in_background=None,
        in_use=(),
        warn=print,
    ):
        """
        Args:
            output_dir: the run's folder.
            model: the bare PreTrainedModel, before `accelerator.prepare` changes its class.
            tokenizer: a Hugging Face tokenizer, saved with each checkpoint.
            keep_last: how many of the newest checkpoints stay; None: all.
            keep_every: checkpoints of steps that are multiples of it stay as well.
            keep_best: the one with the lowest validation loss stays as well.
            in_background: whether training goes on while a checkpoint is written; None: unless it is on a CPU.
            in_use: folders that somebody is reading, which stay for now; looked at each time old ones are removed.
            warn: called with a line when a checkpoint is whole, but the others could not be put in order.
        """
        self.output_dir, self.accelerator, self.tokenizer = Path(output_dir), accelerator, tokenizer
        self._warn, self._in_use = warn, in_use
        self.keep_last, self.keep_every, self.keep_best = keep_last, keep_every, keep_best
        self._meta_model = meta_copy(model)  # what the thread saves; never the model that is being trained
        # On a CPU the thread would take its time from training, and the copies would take memory for nothing.
        self._in_background = accelerator.device.type != "cpu" if in_background is None else in_background
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing = None
        self._has_warned_of_best = False

    def save(self, model, optimizer, state):
        """
        Writes a checkpoint, or starts to. Every process calls it; the main one writes. How it went, `finished` tells,
        which must have told of the one before.

        Args:
            model: the bare model, its parameters as training has them.
            optimizer: as `accelerator.prepare` gave it.
            state: JSON-able dict, with "step" and "val_loss" (None if not known) at least.
        """
        assert self._writing is None, "a second copy of the state in memory, and nobody told of the first"
        accelerator = self.accelerator
        tensors, moments = full_state_dict(model, optimizer, accelerator, copy=self._in_background)
        rng = gather_object([_rng_state(accelerator.device)])
        if accelerator.is_main_process:
            rng = {f"{rank}.{name}": tensor for rank, of_rank in enumerate(rng) for name, tensor in of_rank.items()}
            self._writing = self._thread.submit(self._write, tensors, moments, rng, state)
            if not self._in_background:
                futures.wait([self._writing])

    def finished(self, wait=False):
        """
        Args:
            wait: until what is being written is on the disk.

        Returns:
            The folder of a checkpoint that is whole since the last call, or None.

        Raises:
            SaveError: it could not be written, and why. Those before it are whole.
        """
        if self._writing is None or not (wait or self._writing.done()):
            return None
        writing, self._writing = self._writing, None
        return writing.result()

    def _write(self, tensors, moments, rng, state):
        folder = checkpoint_folder(self.output_dir, state["step"])
        aside = folder.with_name(f".{folder.name}.partial")
        needed = sum(t.nbytes for t in (*tensors.values(), *moments.values())) + _SMALL_FILES_BYTES
        try:
            shutil.rmtree(aside, ignore_errors=True)
            (aside / "training_state").mkdir(parents=True)
            free = shutil.disk_usage(aside).free
            if free < needed:
                raise OSError(f"the disk has {free / 1e9:.2f} GB left")
            load_params(self._meta_model, tensors).save_pretrained(aside)
            try:
                self.tokenizer.save_pretrained(aside)
            except Exception as error:  # what the tokenizers package raises when the disk is full
                raise OSError(str(error)) from error
            save_file(moments, aside / "training_state" / "optimizer.safetensors")
            save_file(rng, aside / "training_state" / "rng.safetensors")
            write_json(aside / "training_state" / "state.json", state)
            apply_umask(aside)
            files = sorted(path for path in aside.rglob("*") if path.is_file())
            for path in files:
                flush_to_disk(path)
            write_json(
                aside / "training_state" / "manifest.json",
                {"files": {path.relative_to(aside).as_posix(): describe_file(path) for path in files}},
            )
            flush_to_disk(aside / "training_state")
            flush_to_disk(aside)
            if folder.exists():  # the same step again, after resuming from an earlier one
                replaced = folder.with_name(f".{folder.name}.replaced")
                folder.rename(replaced)
                aside.rename(folder)
                shutil.rmtree(replaced)
            else:
                aside.rename(folder)
            flush_to_disk(folder.parent)
        except (OSError, SafetensorError) as error:  # a full disk is an OSError here and a SafetensorError there
            shutil.rmtree(aside, ignore_errors=True)
            raise SaveError(
                f"could not write the checkpoint {folder}: {error}. It needs {needed / 1e9:.2f} GB: make room on the "
                "disk, or lower keep_last. The checkpoints before it are whole"
            ) from error
        finally:
            self._meta_model.to("meta")  # gives the copy's memory back
        try:
            self._remove_old(state["step"])
        except OSError as error:
            self._warn(f"warning: {folder} is whole, but older checkpoints could not be put in order ({error})")
        return folder

    def close(self):
        """Wait for what is being written, whose errors `finished` raises, and end the thread."""
        self._thread.shutdown()

    def _remove_old(self, step):
        """Decide by the folders that are there alone, so that a crash in between changes nothing."""
        self._remove_link()
        # A run that was resumed from an earlier step leaves the later ones alone until it comes there again.
        checkpoints = [c for c in list_checkpoints(self.output_dir / "checkpoints") if c.step <= step]
        kept = {c.step for c in checkpoints}
        if self.keep_last is not None:
            kept = {s for s in kept if self.keep_every and s % self.keep_every == 0}
            kept.update(c.step for c in checkpoints[-self.keep_last :])
        best = best_of(checkpoints)
        if self.keep_best and best is not None:
            kept.add(best.step)
        kept.update(c.step for c in checkpoints if c.folder in self._in_use)
        for checkpoint in checkpoints:
            if checkpoint.step not in kept:
                # Renamed first: a folder half removed must not look like a checkpoint.
                removed = checkpoint.folder.with_name(f".{checkpoint.folder.name}.partial")
                checkpoint.folder.rename(removed)
                shutil.rmtree(removed, ignore_errors=True)

    def _remove_link(self):
        """Remove the link `best` of earlier versions; a copy of what it led to is left alone, and named once."""
        path = self.output_dir / "checkpoints" / BEST
        if path.is_symlink():
            path.unlink()
        elif path.is_dir() and not self._has_warned_of_best:
            self._has_warned_of_best = True
            self._warn(
                f"warning: the folder {path} is a copy from before and stays as it is; as a checkpoint's name, {path} "
                "means the step folder with the lowest validation loss. Remove or rename the copy"
            )


def clear_left_overs(output_dir):
    """What a process killed while saving left behind; nobody else may be writing in the folder."""
    for path in (Path(output_dir) / "checkpoints").glob(".step_*"):
        found = _LEFT_OVER.fullmatch(path.name)
        if found is None:
            continue
        folder = path.with_name(found[1])
        if found[2] == "replaced" and not folder.exists():  # killed between the two renames
            path.rename(folder)
        else:
            shutil.rmtree(path)


def check_start(resume, output_dir, say):
    """
    Refuse a start that cannot succeed, as far as that shows without reading the checkpoints.

    Args:
        resume, output_dir, say: as for `find_checkpoint`.

    Returns:
        Path of the checkpoint that `resume` names; None for "auto" and for a fresh start.

    Raises:
        TrainingError: the path is not a checkpoint; a fresh start, or one from elsewhere or from an earlier step, where
            the folder has a run already.
        UserError: the path is a run's folder.
    """
    checkpoints = list_checkpoints(Path(output_dir) / "checkpoints")
    if resume == "auto":
        return None
    newest = checkpoints[-1].folder if checkpoints else None
    if resume is None:
        if checkpoints:
            raise TrainingError(
                f"{output_dir} already holds a run with the checkpoint {newest.name}: go on from it "
                "with --resume auto, choose another --output_dir, or remove the folder"
            )
        return None
    folder = Path(resolve_checkpoint(resume, say))
    if not (folder / "training_state" / "state.json").is_file():
        raise TrainingError(f"--resume {resume}: no training_state/state.json there, so no checkpoint of train.py")
    # What comes next would stand between another branch's checkpoints, and --resume auto would later mistake them.
    if checkpoints and folder.resolve() != newest.resolve():
        raise TrainingError(
            f"--resume {resume}: {output_dir} also holds {newest.name}, from which --resume auto would "
            "go on; give what begins here another --output_dir, or remove the checkpoints after it"
        )
    return folder


def find_checkpoint(resume, output_dir, say):
    """
    Args:
        resume: None, "auto" or the path of a checkpoint.
        say: called with a line about each damaged checkpoint that is passed over.

    Returns:
        Path of a whole checkpoint, every byte of it checked; or None for a fresh start ("auto" with no checkpoint
        there, or None).

    Raises:
        TrainingError: the path is no checkpoint, or a damaged one; a fresh start, or one from elsewhere or from an
            earlier step, where the folder has a run already; "auto", and every checkpoint is damaged.
    """
    folder = check_start(resume, output_dir, say)
    if folder is not None and (damage := find_damage(folder)):
        raise TrainingError(f"--resume {resume}: {damage}; resume from another checkpoint, or --resume auto")
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
            f"every checkpoint in {output_dir} is damaged: choose another --output_dir for a fresh start, or "
            "bring back a whole one"
        )
    return None


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
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{path} cannot be read ({error}). With several machines, output_dir must be on a disk that all of them "
            "share"
        ) from error
    for key, value in must_match.items():
        if state.get(key) == value:
            continue
        new_run = f"or begin a new run with its weights: --init_from {folder} and another --output_dir"
        if key in _DATA_KEYS:
            raise TrainingError(
                f"cannot resume from {folder}: it was trained on other data ({key}: {state.get(key)} then, {value} "
                f"now). Resume with its data.path, {new_run}"
            )
        raise TrainingError(
            f"cannot resume from {folder}: it was trained with {_SETTING_OF.get(key, key)}={state.get(key)}, this run "
            f"has {value}. Resume with the same setting, {new_run}"
        )
    return state


def load_optimizer(folder, model, optimizer, accelerator):
    """Gives the optimizer the moments it had, by parameter name. Raises TrainingError where they do not fit."""
    path = Path(folder) / "training_state" / "optimizer.safetensors"
    anew = f"or begin anew with its weights: --init_from {folder}"
    try:
        tensors = load_file(path)
        if accelerator.device.type == "cpu":  # else they stay mapped from the file, see copy_from_file
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        load_moments(tensors, model, optimizer)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path} cannot be read ({error}); resume from another checkpoint, {anew}") from error
    except ValueError as error:
        raise TrainingError(
            f"{path} does not fit ({error}); resume with the optim.muon_lr (or none) it was saved with, {anew}"
        ) from error


def load_rng(folder, rank, device):
    """Restores this process's random state, where the saved run had a process of this number."""
    tensors = load_file(Path(folder) / "training_state" / "rng.safetensors")
    if f"{rank}.cpu" in tensors:
        torch.set_rng_state(tensors[f"{rank}.cpu"])
    if f"{rank}.{device.type}" in tensors and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(tensors[f"{rank}.{device.type}"])


def _rng_state(device):
    tensors = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        tensors[device.type] = torch.get_device_module(device).get_rng_state()
    return tensors
