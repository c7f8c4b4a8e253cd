"""Accelerate's trackers by name; a resumed run goes on in the same place."""

import importlib.util
import os
import secrets
from pathlib import Path

from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

from training import TrainingError
from training.files import write_aside

TRACKERS = ("tensorboard", "wandb", "trackio")
PROJECT = "gpt2-repro"


def start_trackers(names, accelerator, output_dir, config, *, resume_step):
    """
    Starts the trackers, so that `accelerator.log` reaches them: on the main process, the others have none.

    Args:
        names: of TRACKERS.
        output_dir: the run's folder. Its name is the run's name, tensorboard/ in it is where TensorBoard's files go,
            and the file run_id in it is how W&B and Trackio know the run again.
        config: dict, the resolved settings, shown beside the curves.
        resume_step: the step that the run goes on from; None for a fresh run.

    Raises:
        TrainingError: a tracker's package is not installed.
    """
    output_dir = Path(output_dir)
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise TrainingError(f"trackers: {name} is not installed: pip install {name}, or leave it out")
    if not accelerator.is_main_process:
        return
    run_id = _run_id(output_dir, is_fresh=resume_step is None)
    trackers = []
    if "tensorboard" in names:
        # What a lost stretch wrote after the checkpoint is hidden.
        purge_step = None if resume_step is None else resume_step + 1
        trackers.append(TensorBoardTracker("tensorboard", output_dir, purge_step=purge_step))
    if "wandb" in names:
        os.environ.setdefault("WANDB_SILENT", "true")
        # W&B keeps what it already has of a step and leaves out what comes again.
        trackers.append(WandBTracker(PROJECT, name=output_dir.name, id=run_id, resume="allow", dir=str(output_dir)))
    if "trackio" in names:
        # Trackio goes on by name; a lost stretch stands there twice.
        trackers.append(TrackioTracker(PROJECT, name=run_id, resume="allow"))
    accelerator.log_with = trackers
    accelerator.init_trackers(PROJECT)
    for tracker in trackers:
        if tracker.name != "tensorboard":  # its hyperparameters would be a second run
            tracker.store_init_configuration(config)


def _run_id(output_dir, is_fresh):
    path = output_dir / "run_id"
    if is_fresh or not path.is_file():
        write_aside(path, f"{output_dir.name}-{secrets.token_hex(4)}\n")
    return path.read_text(encoding="utf-8").strip()
