"""Log a run: metrics.jsonl, the console, trackers (TensorBoard, W&B, Trackio), curves.png and report.html."""

import json
import math
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from common.checkpoints import best_of, list_checkpoints
from common.cli import is_main_process, say, shell_quote
from common.errors import UserError, one_line
from common.files import finite, write_json, write_text_atomically
from common.metrics import read_metrics, recover_metrics
from common.terminal import TerminalTitle, progress_bar
from training import TrainingError
from training.checkpoint import LoopState, run_folder_of
from training.curves import format_score, metric_names, plot_curves, score_name, scores_of
from training.estimate import Plan, format_duration
from training.provenance import describe_launch, earlier_launches
from training.report import write_report
from training.run import describe_error

PROJECT = "gpt2-repro"  # in W&B and Trackio
_MAX_TRACKED = 4  # metrics of a task
# desc has the time left, as the console's lines do: tqdm's estimate ignores evaluations and the slow first step.
_BAR = "{n_fmt}/{total_fmt} {bar} {desc}"


class RunLog:
    """Log of a run. Every process has one; only the main process's writes.

    Args:
        argv: arguments of train.py that gave them.
        first_step: steps taken before this launch.
        loss_lines: {name: value} of horizontal lines in the plot of the losses.
        score_lines: the same in the plot of each task.
    """

    def __init__(
        self,
        output_dir: Path,
        plan: Plan,
        settings: dict[str, Any],
        argv: Sequence[str],
        first_step: int,
        *,
        loss_lines: Mapping[str, float],
        score_lines: Mapping[str, Mapping[str, float]],
    ) -> None:
        self._output_dir, self._plan, self._settings, self._argv = output_dir, plan, settings, argv
        self._tokens_per_step = plan.batch.tokens_per_step
        self._loss_lines, self._score_lines = loss_lines, score_lines
        self._title = f"{output_dir.name}: {plan.num_parameters / 1e6:.1f}M parameters"
        self._trackers: list[GeneralTracker] = []
        self._metrics: MetricsWriter | None = None  # on the main process
        self._console = ConsoleLog(
            plan, first_step=first_step, log_every=settings["log_every"], eval_every=settings["eval_every"]
        )
        self.metrics_path = output_dir / "metrics.jsonl"

    def open(
        self, state: LoopState, data_info: dict[str, Any], resume_from: Path | None, last_lr: float | None
    ) -> None:
        """Create the files, provenance.json among them, and start the trackers. Called on the main process.

        Args:
            resume_from: a checkpoint. If it is in another run's folder, that run's history is copied.
            last_lr: this launch's learning rate for the last step of the history.

        Raises:
            UserError: a tracker does not start, or the history cannot be read.
        """
        if self._loss_lines:
            lines = ", ".join(f"{name} {value:.4f}" for name, value in self._loss_lines.items())
            say(f"baseline  {lines} nats per token")
        step, history, earlier = state.step, [], []
        self._output_dir.mkdir(parents=True, exist_ok=True)
        if resume_from is not None:
            folder = run_folder_of(resume_from, self._output_dir)
            earlier = earlier_launches(folder / "provenance.json", step)
            records = recover_metrics(folder / "metrics.jsonl", copy_to=self._output_dir)
            history = records_up_to(records, step, is_evaluated=state.evaluated)
            logged_lr = next((r["lr"] for r in reversed(history) if r["step"] == step and "lr" in r), None)
            if logged_lr is not None and last_lr is not None and not math.isclose(logged_lr, last_lr, rel_tol=1e-6):
                say(
                    f"resume    the learning rate of step {step:,} was {logged_lr:.3g} and is {last_lr:.3g} now: "
                    "max_steps or a setting of optim.* has changed"
                )
        resume_step = None if resume_from is None else step
        self._trackers = start_trackers(self._settings, self._output_dir, resume_step=resume_step)
        self._metrics = MetricsWriter(self.metrics_path, history=history)
        references = {name: dict(lines) for name, lines in {"loss": self._loss_lines, **self._score_lines}.items()}
        launch = describe_launch(self._settings, self._argv, data_info, self._plan, state)
        launch |= {"references": references, "earlier_launches": earlier}
        write_json(self._output_dir / "provenance.json", launch)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.close(error)

    def log_step(
        self,
        state: LoopState,
        *,
        loss: float,
        lr: float,
        grad_norm: float,
        seconds: float,
        windows: Sequence[Any],
        loss_scale: float = 1.0,
    ) -> None:
        """Log a training step.

        Args:
            state: the loop's, after the step.
            windows: descriptions of the windows that made the step's loss or gradient infinite or NaN, so that the step
                was skipped; empty if it was not.
            loss_scale: fp16's, from the next step on; 1 with other precisions.

        Raises:
            TrainingError: this was one skipped step too many. Raised on every process.
        """
        record: dict[str, Any] = {
            "step": state.step,
            "tokens": state.step * self._tokens_per_step,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "ms": round(1000 * seconds, 2),
            "tokens_per_s": round(self._tokens_per_step / seconds, 1),
        }
        if loss_scale != 1:
            record["loss_scale"] = loss_scale
        if windows:
            skips = {"so_far": state.num_skipped, "in_a_row": state.consecutive_skips, "windows": windows}
            record["skipped"] = {"loss": str(loss), "grad_norm": str(grad_norm), **skips}
        if self._metrics is not None:
            self._metrics.write(record)
        if windows:
            say(
                f"step {state.step:>6,} | SKIPPED: loss {loss}, gradient norm {grad_norm}; its windows are in "
                f"metrics.jsonl; skipped so far: {state.num_skipped}, in a row: {state.consecutive_skips}"
            )
        elif not math.isfinite(grad_norm):
            say(f"step {state.step:>6,} | fp16: a gradient overflowed; step left out, loss scale now {loss_scale:,g}")
        else:
            self._track(state.step, {name: value for name, value in record.items() if name != "step"})
        self._console.log_step(record)
        if state.consecutive_skips >= self._settings["optim"]["max_skipped_steps"]:
            raise TrainingError(
                f"step {state.step}: loss {loss}, gradient norm {grad_norm}; the last {state.consecutive_skips} steps "
                "were not finite. The parameters are those from before, and so are the checkpoints. Lower optim.lr or "
                "raise optim.warmup_steps, look at the windows in metrics.jsonl, and resume with --resume auto"
            )

    def log_evaluation(self, step: int, result: dict[str, Any]) -> None:
        """Log an evaluation and draw curves.png.

        Args:
            result: val_loss, val_losses (of each folder of a mixture; or None), hellaswag (its metrics, n,
                num_truncated and is_sample; or None), hellaswag_seconds, scores and score_seconds (the same of other
                tasks), seconds and samples.
        """
        if self._metrics is None:
            return
        samples = result["samples"]
        result = {name: value for name, value in result.items() if value not in (None, [], {}) or name == "hellaswag"}
        record = {"step": step, "tokens": step * self._tokens_per_step, **result}
        self._metrics.write(record)
        tracked: dict[str, float] = {}
        for task, scores in scores_of(record).items():
            main, *others = metric_names(scores)  # CORE has dozens of others
            for name in [main, *others] if len(others) < _MAX_TRACKED else [main]:
                tracked[score_name(task, name).replace(" ", "_")] = scores[name]
        tracked |= {f"val_loss/{folder}": loss for folder, loss in record.get("val_losses", {}).items()}
        self._track(step, {"val_loss": record["val_loss"], **tracked})
        self._console.log_evaluation(record)
        for text in samples:
            say(f"    {text!r}")
        if step == 0:
            return  # nothing to draw yet, and importing matplotlib would delay the first step
        try:
            plot_curves(
                read_metrics(self.metrics_path),
                self._output_dir / "curves.png",
                title=self._title,
                loss_lines=self._loss_lines,
                score_lines=self._score_lines,
            )
        except (OSError, UserError) as error:
            say(f"warning: curves.png could not be written ({error})")

    def _track(self, step: int, values: dict[str, float]) -> None:
        for tracker in [*self._trackers]:
            try:
                tracker.log(values, step=step)
            except Exception as error:  # of each client's own class; some do not recover from a full disk
                say(
                    f"warning: {tracker.name} stops at step {step:,} ({one_line(error)}); metrics.jsonl continues, and "
                    f"{tracker.name} does when the run is resumed"
                )
                self._trackers.remove(tracker)

    def close(self, error: BaseException | None = None) -> None:
        """Close the files, write report.html and let the trackers send what they have. A second call does nothing."""
        self._console.close()
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
            if not isinstance(error, KeyboardInterrupt):  # a second Ctrl-C ends the run at once
                try:
                    write_report(self._output_dir, failure=None if error is None else describe_error(error))
                except Exception as report_error:  # it must not replace the error that ends the run
                    say(f"warning: report.html could not be written ({one_line(report_error)})")
        while self._trackers:
            tracker = self._trackers.pop()
            try:
                if error is not None and tracker.name == "wandb":  # it shows that the run failed
                    tracker.run.finish(exit_code=1)
                else:
                    tracker.finish()
            except Exception as tracker_error:  # each client has its own classes, and the run is over
                say(f"warning: {tracker.name} could not finish ({one_line(tracker_error)})")

    def print_summary(self, state: LoopState, checkpoint: Path) -> None:
        """Print the results and commands to use the checkpoint."""
        say(f"\ntrained for {format_duration(self._console.training_seconds)}, without evaluations and saving")
        if state.num_skipped:
            say(f"skipped {state.num_skipped} steps that were not finite; their windows are in {self.metrics_path}")
        lines = "".join(f", {name} {value:.4f}" for name, value in self._loss_lines.items())
        say(f"validation loss {state.val_loss:.4f}{lines}")
        best = best_of(list_checkpoints(checkpoint.parent))
        if best is not None and best.folder != checkpoint:
            say(f"best      {best.describe()}")
        board = self._output_dir / "tensorboard"
        show_board = f"    (tensorboard --logdir {shell_quote(board)})" if board.is_dir() else ""
        say(
            NEXT_STEPS.format(
                folder=checkpoint.as_posix(),  # no backslashes inside Python's quotes
                quoted=shell_quote(checkpoint),
                curves=self._output_dir / "curves.png",
                report=self._output_dir / "report.html",
                prompt=shell_quote((self._settings["eval"]["prompts"] or [_PROMPT])[0]),
                metrics=f"{self.metrics_path}{show_board}",
            )
        )


_PROMPT = "Hello, I'm"
NEXT_STEPS = """
checkpoint  {folder}
report      {report}
curves      {curves}
numbers     {metrics}

load    from transformers import AutoModelForCausalLM, AutoTokenizer
        model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained("{folder}", trust_remote_code=True)
sample  python sample.py {quoted} {prompt}
score   python -m eval --model {quoted} --tasks hellaswag
share   python -m hub push {quoted} USER/NAME    (after: hf auth login)"""


# ---------------------------------------------------------------------------------------------------------------
# metrics.jsonl


class MetricsWriter:
    """Writes metrics.jsonl: one JSON object per line, one line per training step and one per evaluation.

    The line of a step has "step", "tokens", "loss", "lr", "grad_norm", "ms" and "tokens_per_s", with fp16 also
    "loss_scale". That of an evaluation has "step", "tokens", "val_loss", "hellaswag", "hellaswag_seconds", "seconds"
    and "samples", for a mixture also "val_losses" by folder, and for eval.tasks "scores" and "score_seconds" by task.
    `step` counts optimizer steps. A skipped step also has "skipped", and null for a number that is not finite.

    Args:
        history: records to begin with, from `records_up_to` for a resumed run.
    """

    def __init__(self, path: Path, *, history: Iterable[dict[str, Any]] = ()) -> None:
        self.path = path
        write_text_atomically(self.path, "".join(json.dumps(record) + "\n" for record in history))
        self._file = self.path.open("ab", buffering=0)
        self._pending = b""

    def write(self, record: dict[str, Any]) -> None:
        """Append a line. On a full disk, warn; the line stays in memory and is written with a later one."""
        was_behind = bool(self._pending)
        self._pending += json.dumps(finite(record), allow_nan=False).encode() + b"\n"
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not was_behind:
                say(f"warning: {self.path} cannot be written ({error}); its lines are kept until it can")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def records_up_to(records: Iterable[dict[str, Any]], step: int, *, is_evaluated: bool) -> list[dict[str, Any]]:
    """Drop records newer than a checkpoint; the resumed run writes those steps again.

    Args:
        step: the checkpoint's.
        is_evaluated: True if the evaluation of that step was finished when the checkpoint was saved.
    """
    return [r for r in records if r["step"] < step or (r["step"] == step and (is_evaluated or "val_loss" not in r))]


# ---------------------------------------------------------------------------------------------------------------
# Console


class ConsoleLog:
    """Prints one line per log interval, shows a progress bar and the terminal's title, and estimates the time left."""

    def __init__(self, plan: Plan, *, first_step: int, log_every: int, eval_every: int) -> None:
        self._plan, self._first_step, self._log_every, self._eval_every = plan, first_step, log_every, eval_every
        self._bar = progress_bar(
            is_shown=is_main_process(),
            total=plan.max_steps,
            initial=first_step,
            bar_format=_BAR,
            dynamic_ncols=True,
        )
        self._terminal_title = TerminalTitle(is_shown=is_main_process())
        self._seconds: list[float] = []  # of the steps since the last line
        self._first_step_seconds = 0.0  # including compilation
        self._evaluation_seconds: list[float] = []
        self.training_seconds = 0.0
        """of all steps, without evaluations and saving"""

    def log_step(self, record: dict[str, Any]) -> None:
        """Update the bar. At the first step and at multiples of log_every, print a line and set the title."""
        step, loss, seconds, plan = record["step"], record["loss"], record["ms"] / 1000, self._plan
        steps_done, num_devices = step - self._first_step, plan.hardware.num_processes
        self._seconds.append(seconds)
        self.training_seconds += seconds
        if steps_done == 1:
            self._first_step_seconds = seconds
        seconds_left = self._seconds_left(step)
        dollars = seconds_left / 3600 * (plan.hardware.dollars_per_hour or 0) * num_devices
        cost = f", ${dollars:,.2f}" if plan.hardware.dollars_per_hour else ""
        left = f"{format_duration(seconds_left)}{cost} left"
        if plan.compiled and steps_done == 1:  # an estimate would count its compiling for every step
            left = "first step"
        self._bar.set_description_str(f"loss {loss:.4f}, {left}", refresh=False)
        self._bar.update()
        if step % self._log_every and steps_done > 1:
            return
        seconds_per_step = sum(self._seconds) / len(self._seconds)
        tokens_per_s = plan.batch.tokens_per_step / seconds_per_step
        share_of_peak = tokens_per_s * plan.flops_per_token / (plan.hardware.peak_flops * num_devices)
        self._seconds.clear()
        self._terminal_title.set(f"{PROJECT} {step / plan.max_steps:.0%} loss {loss:.2f} {left}")
        say(
            f"step {step:>6,}/{plan.max_steps:,} {step / plan.max_steps:4.0%} | loss {loss:.4f} | "
            f"lr {record['lr']:.2e} | norm {record['grad_norm']:.2f} | {1000 * seconds_per_step:,.0f} ms | "
            f"{tokens_per_s:,.0f} tok/s | {share_of_peak:.1%} of peak | {left}"
        )

    def log_evaluation(self, record: dict[str, Any]) -> None:
        """Print the line of an evaluation."""
        self._evaluation_seconds.append(record["seconds"])
        line = f"step {record['step']:>6,} | val loss {record['val_loss']:.4f}"
        if folders := record.get("val_losses"):
            line += f" ({', '.join(f'{folder} {loss:.4f}' for folder, loss in folders.items())})"
        if record["hellaswag"]:
            line += f" | {_describe_scores('hellaswag', record['hellaswag'], record['hellaswag_seconds'])}"
        say(f"{line} | {record['seconds']:.1f} s")
        scores = record.get("scores", {}).items()
        if texts := [_describe_scores(task, values, record["score_seconds"][task]) for task, values in scores]:
            say(" | ".join([f"{'scores':<11}", *texts]))

    def close(self) -> None:
        """Remove the bar and the title."""
        self._bar.close()
        self._terminal_title.restore()

    def _seconds_left(self, step: int) -> float:
        """Estimate the time of the remaining steps and evaluations."""
        steps_left, steps_done = self._plan.max_steps - step, step - self._first_step
        seconds_per_step = self.training_seconds / steps_done
        if steps_done > 1:  # the first step also compiles and warms up
            seconds_per_step = (self.training_seconds - self._first_step_seconds) / (steps_done - 1)
        seconds_left = seconds_per_step * steps_left
        if self._evaluation_seconds:
            mean = sum(self._evaluation_seconds) / len(self._evaluation_seconds)
            seconds_left += mean * math.ceil(steps_left / self._eval_every)
        return seconds_left


def _describe_scores(task: str, scores: dict[str, Any], seconds: float) -> str:
    main = metric_names(scores)[0]
    error = f" ± {format_score(scores[f'{main}_stderr'])}" if f"{main}_stderr" in scores else ""
    sample = "SAMPLE items, " if scores["is_sample"] else ""
    truncated = f", {scores['num_truncated']:,} truncated" if scores["num_truncated"] else ""
    about = f"{sample}n={scores['n']:,}{truncated}, {seconds:.1f} s"
    return f"{score_name(task, main)} {format_score(scores[main])}{error} ({about})"


# ---------------------------------------------------------------------------------------------------------------
# Trackers


def start_trackers(settings: dict[str, Any], output_dir: Path, *, resume_step: int | None) -> list[GeneralTracker]:
    """Start accelerate's trackers. Called on the main process.

    Args:
        settings: the run's, shown next to the curves. Its "trackers" are to be started.
        output_dir: the run's folder. Its name is the run's name, its tensorboard/ has TensorBoard's files, and its file
            run_id identifies the run to W&B and Trackio.
        resume_step: the step that the run resumes from; None for a fresh run.

    Raises:
        TrainingError: a tracker does not start (no account, no network).
    """
    id_path = output_dir / "run_id"
    if resume_step is None or not id_path.is_file():
        write_text_atomically(id_path, f"{output_dir.name}-{secrets.token_hex(4)}\n")
    run_id = id_path.read_text(encoding="utf-8").strip()
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
    for name in settings["trackers"]:
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
