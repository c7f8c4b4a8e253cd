"""Accelerate's trackers by name; a resumed run goes on in the same place."""

import importlib.util
import os
import secrets
from pathlib import Path

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from common.files import write_aside
from training import TrainingError

TRACKERS = ("tensorboard", "wandb", "trackio")
PROJECT = "gpt2-repro"


def check_trackers(names):
    """Raises TrainingError for a tracker whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise TrainingError(f"trackers: {name} is not installed: pip install {name}, or leave it out")


def start_trackers(names, output_dir, config, *, resume_step):
    """
    On the main process only.

    Args:
        names: of TRACKERS.
        output_dir: the run's folder. Its name is the run's name, tensorboard/ in it is where TensorBoard's files go,
            and the file run_id in it is how W&B and Trackio know the run again.
        config: dict, the resolved settings, shown beside the curves.
        resume_step: the step that the run goes on from; None for a fresh run.

    Returns:
        list of accelerate.tracking.GeneralTracker.

    Raises:
        TrainingError: one does not start (no account, no network).
    """
    output_dir = Path(output_dir)
    run_id = _run_id(output_dir, is_fresh=resume_step is None)
    # What a lost stretch wrote after the checkpoint is hidden.
    purge_step = 0 if resume_step is None else resume_step + 1
    start = {
        "tensorboard": lambda: TensorBoardTracker("tensorboard", output_dir, purge_step=purge_step),
        # W&B keeps what it already has of a step and leaves out what comes again.
        "wandb": lambda: WandBTracker(PROJECT, name=output_dir.name, id=run_id, resume="allow", dir=str(output_dir)),
        # Trackio goes on by name; a lost stretch stands there twice.
        "trackio": lambda: TrackioTracker(PROJECT, name=run_id, resume="allow"),
    }
    os.environ.setdefault("WANDB_SILENT", "true")
    trackers = []
    for name in names:
        try:
            tracker = start[name]()
            tracker.start()
            if name != "tensorboard":  # its hyperparameters would be a second run
                tracker.store_init_configuration(config)
        except Exception as error:  # of every kind: each has a client of its own
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise TrainingError(
                f"trackers: {name} does not start ({first_line}); mend that, or leave it out"
            ) from error
        trackers.append(tracker)
    return trackers


def finish_tracker(tracker: GeneralTracker, *, has_failed: bool) -> None:
    """Let a tracker send what it has. If the run failed, W&B shows that, and the tracker's own errors do not count."""
    try:
        if has_failed and tracker.name == "wandb":
            tracker.run.finish(exit_code=1)
        else:
            tracker.finish()
    except Exception:
        if not has_failed:
            raise


def _run_id(output_dir, is_fresh):
    path = output_dir / "run_id"
    if is_fresh or not path.is_file():
        write_aside(path, f"{output_dir.name}-{secrets.token_hex(4)}\n")
    return path.read_text(encoding="utf-8").strip()
