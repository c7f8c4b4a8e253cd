"""Log a run: metrics.jsonl, the console, trackers (TensorBoard, W&B, Trackio) and curves.png."""

import importlib.util
import json
import math
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from tqdm import tqdm

from common.checkpoints import best_of, list_checkpoints
from common.cli import shell_quote
from common.errors import UserError, one_line
from common.files import finite, write_text_atomically
from common.metrics import read_metrics, recover_metrics
from training import TrainingError
from training.curves import plot_curves
from training.estimate import Plan, format_duration

PROJECT = "gpt2-repro"  # in W&B and Trackio
# The time left is the console lines', since tqdm's estimate ignores evaluations and the slow first step.
_BAR = "{n_fmt}/{total_fmt} {bar} {desc}"


class RunLog:
    """Log of a run. Every process has one; only the main process's writes."""

    def __init__(
        self,
        output_dir: Path,
        *,
        say: Callable[[str], object],
        is_main_process: bool,
        plan: Plan,
        step: int,
        log_every: int,
        eval_every: int,
        loss_lines: Mapping[str, float],
        score_lines: Mapping[str, float],
    ):
        """
        Args:
            output_dir: the run's folder.
            say: prints a line.
            step: steps taken before this launch.
            log_every: steps between lines on the console.
            loss_lines: {name: value} of horizontal lines in the plot of the losses.
            score_lines: the same in the plot of HellaSwag.
        """
        self._say, self._is_main, self._output_dir = say, is_main_process, output_dir
        self._loss_lines, self._score_lines = loss_lines, score_lines
        self._title = f"{output_dir.name}: {plan.num_parameters / 1e6:.1f}M parameters"
        self._trackers: list[GeneralTracker] = []
        self._metrics: MetricsWriter | None = None
        self.metrics_path = output_dir / "metrics.jsonl"
        if is_main_process:
            hardware = plan.hardware
            self._console = ConsoleLog(
                say,
                step=step,
                max_steps=plan.max_steps,
                log_every=log_every,
                eval_every=eval_every,
                tokens_per_step=plan.batch.tokens_per_step,
                flops_per_token=plan.flops_per_token,
                peak_flops=hardware.peak_flops * hardware.num_processes,
                dollars_per_hour=hardware.dollars_per_hour and hardware.dollars_per_hour * hardware.num_processes,
            )

    def open(
        self,
        trackers: Sequence[str],
        settings: dict[str, Any],
        *,
        step: int,
        previous_folder: Path | None = None,
        is_evaluated: bool = False,
        last_lr: float | None = None,
    ) -> None:
        """
        Create the files and start the trackers. Called on the main process.

        Args:
            trackers: "tensorboard", "wandb", "trackio".
            settings: shown by the trackers.
            step: steps taken before this launch.
            previous_folder: the run's folder that this launch resumes from; a run that is resumed into a new folder
                copies its history. None for a fresh run.
            is_evaluated: True if the evaluation of `step` is in the history.
            last_lr: this launch's learning rate for the last step of the history.

        Raises:
            UserError: a tracker does not start, or the history cannot be read.
        """
        history = []
        self._output_dir.mkdir(parents=True, exist_ok=True)
        if previous_folder is not None:
            records = recover_metrics(previous_folder / "metrics.jsonl", copy_to=self._output_dir, warn=self._say)
            history = records_up_to(records, step, is_evaluated=is_evaluated)
            logged_lr = next((r["lr"] for r in reversed(history) if r["step"] == step and "lr" in r), last_lr)
            if last_lr is not None and not math.isclose(logged_lr, last_lr, rel_tol=1e-6):
                self._say(
                    f"resume    the learning rate of step {step:,} was {logged_lr:.3g} and is {last_lr:.3g} now: "
                    "max_steps or a setting of optim.* has changed"
                )
        resume_step = None if previous_folder is None else step
        self._trackers = start_trackers(trackers, self._output_dir, settings, resume_step=resume_step)
        self._metrics = MetricsWriter(self.metrics_path, history=history, warn=self._say)

    def log_step(self, record: dict[str, Any]) -> None:
        """
        Log a training step.

        Args:
            record: step, tokens, loss, lr, grad_norm, ms, tokens_per_s; if the step was skipped also "skipped", with
                loss, grad_norm, so_far, in_a_row and windows.
        """
        if not self._is_main:
            return
        self._metrics.write(record)
        if "skipped" in record:
            skipped = record["skipped"]
            self._say(
                f"step {record['step']:>6,} | SKIPPED: loss {skipped['loss']}, gradient norm {skipped['grad_norm']}; "
                "its windows are in metrics.jsonl; "
                f"skipped so far: {skipped['so_far']}, in a row: {skipped['in_a_row']}"
            )
        else:
            self._track(record["step"], {name: value for name, value in record.items() if name != "step"})
        self._console.log_step(record)

    def log_evaluation(self, record: dict[str, Any]) -> None:
        """
        Log an evaluation and draw curves.png.

        Args:
            record: step, tokens, val_loss, hellaswag (its metrics, n, num_truncated and is_sample; or None),
                hellaswag_seconds, seconds.
        """
        if not self._is_main:
            return
        self._metrics.write(record)
        scores = record["hellaswag"] or {}
        tracked = {f"hellaswag_{name}": scores[name] for name in ("acc", "acc_norm") if scores}
        self._track(record["step"], {"val_loss": record["val_loss"], **tracked})
        self._console.log_evaluation(record)
        if record["step"] == 0:
            return  # nothing to draw yet, and importing matplotlib would delay the first step
        try:
            plot_curves(
                read_metrics(self.metrics_path),
                self._output_dir / "curves.png",
                title=self._title,
                loss_lines=self._loss_lines,
                hellaswag_lines=self._score_lines,
            )
        except (OSError, UserError) as error:
            self._say(f"warning: curves.png could not be written ({error})")

    def _track(self, step: int, values: dict[str, float]) -> None:
        for tracker in [*self._trackers]:
            try:
                tracker.log(values, step=step)
            except OSError as error:  # a full disk or a lost network; TensorBoard's writer does not recover from it
                self._say(
                    f"warning: {tracker.name} stops at step {step:,} ({error}); metrics.jsonl continues, and "
                    f"{tracker.name} does when the run is resumed"
                )
                self._trackers.remove(tracker)

    def close(self, *, has_failed: bool = False) -> None:
        """Close the files and let the trackers send what they have. A second call does nothing."""
        if not self._is_main:
            return
        self._console.close()
        if self._metrics is not None:
            self._metrics.close()
        while self._trackers:
            finish_tracker(self._trackers.pop(), has_failed=has_failed)

    def print_summary(self, *, val_loss: float | None, num_skipped: int, checkpoint: Path) -> None:
        """Print the results and commands to use the checkpoint."""
        if not self._is_main:
            return
        self._say(f"\ntrained for {format_duration(self._console.training_seconds)}, without evaluations and saving")
        if num_skipped:
            self._say(f"skipped {num_skipped} steps that were not finite; their windows are in {self.metrics_path}")
        lines = "".join(f", {name} {value:.4f}" for name, value in self._loss_lines.items())
        self._say(f"validation loss {'not finite' if val_loss is None else f'{val_loss:.4f}'}{lines}")
        best = best_of(list_checkpoints(checkpoint.parent))
        if best is not None and best.folder != checkpoint:
            self._say(f"best      {best.describe()}")
        board = self._output_dir / "tensorboard"
        show_board = f"    (tensorboard --logdir {shell_quote(board)})" if board.is_dir() else ""
        self._say(
            NEXT_STEPS.format(
                folder=checkpoint.as_posix(),  # no backslashes inside Python's quotes
                quoted=shell_quote(checkpoint),
                curves=self._output_dir / "curves.png",
                metrics=f"{self.metrics_path}{show_board}",
            )
        )


NEXT_STEPS = """
checkpoint  {folder}
curves      {curves}
numbers     {metrics}

load    from transformers import AutoModelForCausalLM, AutoTokenizer
        model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained("{folder}", trust_remote_code=True)
sample  python sample.py {quoted} "Hello, I'm"
score   python -m eval --model {quoted} --tasks hellaswag
share   python -m hub push {quoted} USER/NAME    (after: hf auth login)"""


# ---------------------------------------------------------------------------------------------------------------
# metrics.jsonl


class MetricsWriter:
    """
    Writes metrics.jsonl: one JSON object per line, one line per training step and one per evaluation.

    A step's is {"step", "tokens", "loss", "lr", "grad_norm", "ms", "tokens_per_s"}, an evaluation's {"step", "tokens",
    "val_loss", "hellaswag", "hellaswag_seconds", "seconds"}. `step` counts optimizer steps. A skipped step also has
    "skipped", and null for a number that is not finite.
    """

    def __init__(self, path: Path, *, history: Iterable[dict[str, Any]] = (), warn: Callable[[str], object] = print):
        """
        Args:
            path: the file, which is replaced.
            history: records to begin with, from `records_up_to` for a resumed run.
            warn: called with a line if the disk does not accept a record.
        """
        self.path, self._warn = path, warn
        write_text_atomically(self.path, "".join(json.dumps(record) + "\n" for record in history))
        self._file = self.path.open("ab", buffering=0)
        self._pending = b""

    def write(self, record: dict[str, Any]) -> None:
        """Append a line. On a full disk, the line stays in memory and is written with a later one."""
        was_behind = bool(self._pending)
        self._pending += json.dumps(finite(record), allow_nan=False).encode() + b"\n"
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not was_behind:
                self._warn(f"warning: {self.path} cannot be written ({error}); its lines are kept until it can")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def records_up_to(records: Iterable[dict[str, Any]], step: int, *, is_evaluated: bool) -> list[dict[str, Any]]:
    """
    Drop records newer than a checkpoint; the resumed run writes those steps again.

    Args:
        step: the checkpoint's.
        is_evaluated: True if the evaluation of that step was finished when the checkpoint was saved.
    """
    return [r for r in records if r["step"] < step or (r["step"] == step and (is_evaluated or "val_loss" not in r))]


# ---------------------------------------------------------------------------------------------------------------
# Console


class ConsoleLog:
    """Prints one line per log interval, shows a progress bar on a terminal, and estimates the time left."""

    def __init__(
        self,
        say: Callable[[str], object],
        *,
        step: int,
        max_steps: int,
        log_every: int,
        eval_every: int,
        tokens_per_step: int,
        flops_per_token: float,
        peak_flops: float,
        dollars_per_hour: float | None,
    ):
        """
        Args:
            say: prints a line.
            step: steps taken before this launch.
            peak_flops: FLOP/s of all devices together.
            dollars_per_hour: of all devices together; None if unknown.
        """
        self._say = say
        self._first_step, self._max_steps = step, max_steps
        self._log_every, self._eval_every = log_every, eval_every
        self._tokens_per_step = tokens_per_step
        self._peak_tokens_per_s = peak_flops / flops_per_token
        self._dollars_per_hour = dollars_per_hour
        self._bar = tqdm(
            total=max_steps,
            initial=step,
            bar_format=_BAR,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self._seconds: list[float] = []  # of the steps since the last line
        self._first_step_seconds = 0.0  # including compilation
        self._evaluation_seconds: list[float] = []
        self.training_seconds = 0.0
        """of all steps, without evaluations and saving"""

    def log_step(self, record: dict[str, Any]) -> None:
        """Update the bar, and print a line at the first step and at multiples of log_every."""
        step, seconds = record["step"], record["ms"] / 1000
        steps_done = step - self._first_step
        self._seconds.append(seconds)
        self.training_seconds += seconds
        if steps_done == 1:
            self._first_step_seconds = seconds
        seconds_left = self._seconds_left(step)
        loss = math.nan if record["loss"] is None else record["loss"]
        self._bar.set_description_str(f"loss {loss:.4f}, {format_duration(seconds_left)} left", refresh=False)
        self._bar.update()
        if step % self._log_every and steps_done > 1:
            return
        seconds_per_step = sum(self._seconds) / len(self._seconds)
        tokens_per_s = self._tokens_per_step / seconds_per_step
        self._seconds.clear()
        cost = f", ${seconds_left / 3600 * self._dollars_per_hour:,.2f}" if self._dollars_per_hour else ""
        self._say(
            f"step {step:>6,}/{self._max_steps:,} {step / self._max_steps:4.0%} | loss {record['loss']:.4f} | "
            f"lr {record['lr']:.2e} | norm {record['grad_norm']:.2f} | {1000 * seconds_per_step:,.0f} ms | "
            f"{tokens_per_s:,.0f} tok/s | {tokens_per_s / self._peak_tokens_per_s:.1%} of peak | "
            f"{format_duration(seconds_left)}{cost} left"
        )

    def log_evaluation(self, record: dict[str, Any]) -> None:
        """Print the line of an evaluation."""
        self._evaluation_seconds.append(record["seconds"])
        line = f"step {record['step']:>6,} | val loss {record['val_loss']:.4f}"
        scores = record["hellaswag"]
        if scores:
            truncated = f", {scores['num_truncated']} truncated" if scores["num_truncated"] else ""
            line += (
                f" | hellaswag acc_norm {scores['acc_norm']:.4f} ± {scores['acc_norm_stderr']:.4f}"
                f" ({'SAMPLE items' if scores['is_sample'] else 'items'}, n={scores['n']}{truncated}, "
                f"{record['hellaswag_seconds']:.1f} s)"
            )
        self._say(f"{line} | {record['seconds']:.1f} s")

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()

    def _seconds_left(self, step: int) -> float:
        """Estimate the time of the remaining steps and evaluations."""
        steps_left, steps_done = self._max_steps - step, step - self._first_step
        seconds_per_step = self.training_seconds / steps_done
        if steps_done > 1:  # the first step also compiles and warms up
            seconds_per_step = (self.training_seconds - self._first_step_seconds) / (steps_done - 1)
        seconds_left = seconds_per_step * steps_left
        if self._evaluation_seconds:
            mean = sum(self._evaluation_seconds) / len(self._evaluation_seconds)
            seconds_left += mean * math.ceil(steps_left / self._eval_every)
        return seconds_left


# ---------------------------------------------------------------------------------------------------------------
# Trackers


def check_trackers(names: Iterable[str]) -> None:
    """Raise TrainingError if a tracker's package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise TrainingError(f"trackers: {name} is not installed: pip install {name}, or leave it out")


def start_trackers(
    names: Iterable[str], output_dir: Path, settings: dict[str, Any], *, resume_step: int | None
) -> list[GeneralTracker]:
    """
    Start accelerate's trackers by name. Called on the main process.

    Args:
        names: "tensorboard", "wandb", "trackio".
        output_dir: the run's folder. Its name is the run's name, its tensorboard/ has TensorBoard's files, and its file
            run_id identifies the run to W&B and Trackio.
        settings: shown next to the curves.
        resume_step: the step that the run resumes from; None for a fresh run.

    Raises:
        TrainingError: a tracker does not start (no account, no network).
    """
    run_id = _run_id(output_dir, is_fresh=resume_step is None)
    # TensorBoard hides what a killed launch wrote after the checkpoint.
    purge_step = 0 if resume_step is None else resume_step + 1
    start = {
        "tensorboard": lambda: TensorBoardTracker("tensorboard", output_dir, purge_step=purge_step),
        # W&B keeps the first record of a step and ignores a second one.
        "wandb": lambda: WandBTracker(PROJECT, name=output_dir.name, id=run_id, resume="allow", dir=str(output_dir)),
        # Trackio resumes by name and shows such steps twice.
        "trackio": lambda: TrackioTracker(PROJECT, name=run_id, resume="allow"),
    }
    os.environ.setdefault("WANDB_SILENT", "true")
    trackers = []
    for name in names:
        try:
            tracker = start[name]()
            tracker.start()
            if name != "tensorboard":  # its hyperparameters would appear as a second run
                tracker.store_init_configuration(settings)
        except Exception as error:  # each client has its own classes
            raise TrainingError(
                f"trackers: {name} does not start ({one_line(error)}); fix that, or leave it out"
            ) from error
        trackers.append(tracker)
    return trackers


def finish_tracker(tracker: GeneralTracker, *, has_failed: bool) -> None:
    """Let a tracker send what it has. If the run failed, W&B shows that, and the tracker's own errors are ignored."""
    try:
        if has_failed and tracker.name == "wandb":
            tracker.run.finish(exit_code=1)
        else:
            tracker.finish()
    except Exception:
        if not has_failed:
            raise


def _run_id(output_dir: Path, is_fresh: bool) -> str:
    path = output_dir / "run_id"
    if is_fresh or not path.is_file():
        write_text_atomically(path, f"{output_dir.name}-{secrets.token_hex(4)}\n")
    return path.read_text(encoding="utf-8").strip()
