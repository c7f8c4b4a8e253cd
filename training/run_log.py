"""Everything that a run tells: metrics.jsonl, trackers, curves.png, and lines with a live bar on the console."""

import dataclasses
import math

from common.checkpoints import best_of, list_checkpoints
from common.cli import shell_quote
from common.errors import UserError
from common.metrics import read_metrics, recover_metrics
from training.checkpoint import run_folder_of
from training.curves import plot_curves
from training.distributed import run_on_main
from training.estimate import format_duration
from training.metrics import MetricsLog, until
from training.optim import learning_rate
from training.progress import Progress
from training.provenance import provenance, write_provenance
from training.trackers import finish_tracker, start_trackers


class RunLog:
    """Every process has one; the main process tells, and the others' methods do nothing."""

    def __init__(
        self,
        output_dir,
        *,
        say,
        accelerator,
        config,
        plan,
        data,
        resume_from,
        step,
        is_evaluated,
        loss_lines,
        score_lines,
    ):
        """
        Args:
            output_dir: the run's folder.
            say: prints a line.
            accelerator: accelerate.Accelerator.
            config: training.config.Config.
            plan: training.plan.Plan.
            data: dict that identifies the training data, for provenance.json.
            resume_from: Path of the checkpoint that the run goes on from, or None.
            step, is_evaluated: where the run stands, and whether the evaluation of that step is over.
            loss_lines, score_lines: {name: value}, horizontal lines in curves.png.

        Raises:
            TrainingError: a tracker does not start, the lines of before cannot be read.
        """
        self._say, self._is_main, self._output_dir = say, accelerator.is_main_process, output_dir
        self._loss_lines, self._score_lines = loss_lines, score_lines
        self._title = f"{output_dir.name}: {plan.num_parameters / 1e6:.1f}M parameters"
        self.metrics_path = output_dir / "metrics.jsonl"

        def start():
            earlier, before = [], None
            output_dir.mkdir(parents=True, exist_ok=True)
            if resume_from is not None:  # a branch in a folder of its own takes its past along
                past = run_folder_of(resume_from, output_dir)
                records = recover_metrics(past / "metrics.jsonl", copy_to=output_dir, warn=say)
                earlier = until(records, step, is_evaluated=is_evaluated)
                self._say_if_learning_rate_jumps(earlier, config)
                before = past / "provenance.json"
            settings = dataclasses.asdict(config)
            resume_step = None if resume_from is None else step
            self._trackers = start_trackers(config.trackers, output_dir, settings, resume_step=resume_step)
            record = provenance(config=settings, data=data, plan=plan, accelerator=accelerator, step=step)
            write_provenance(output_dir / "provenance.json", record, before=before)
            self._metrics = MetricsLog(self.metrics_path, earlier=earlier, warn=say)
            self._progress = Progress(
                say,
                step=step,
                max_steps=config.max_steps,
                log_every=config.log_every,
                eval_every=config.eval_every,
                tokens_per_step=config.batch.tokens_per_step,
                flops_per_token=plan.flops_per_token,
                peak_flops=plan.hardware.peak_flops * plan.hardware.num_processes,
                dollars_an_hour=plan.hardware.dollars_per_hour
                and plan.hardware.dollars_per_hour * plan.hardware.num_processes,
            )

        run_on_main(accelerator, start)

    def _say_if_learning_rate_jumps(self, earlier: list[dict], config) -> None:
        """Say so where max_steps or a setting of optim.* gives another learning rate at this step than the run had."""
        last = next((record for record in reversed(earlier) if "lr" in record), None)
        if last is None:
            return
        now = learning_rate(last["step"] - 1, config.optim, config.max_steps)
        if not math.isclose(last["lr"], now, rel_tol=1e-6):
            self._say(
                f"resume    the learning rate of step {last['step']:,} was {last['lr']:.3g} and is {now:.3g} now: "
                "max_steps or a setting of optim.* has changed"
            )

    def step(self, record):
        """
        A training step.

        Args:
            record: dict with step, tokens, loss, lr, grad_norm, ms, tokens_per_s; if it was skipped also "skipped", as
                `training.skipping` describes it.
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
        self._progress.stepped(record)

    def evaluation(self, record):
        """
        An evaluation.

        Args:
            record: dict with step, tokens, val_loss, hellaswag (its figures, n, num_truncated and is_sample; or None),
                hellaswag_seconds, seconds (of all of it).
        """
        if not self._is_main:
            return
        self._metrics.write(record)
        scores = record["hellaswag"] or {}
        tracked = {f"hellaswag_{name}": scores[name] for name in ("acc", "acc_norm") if scores}
        self._track(record["step"], {"val_loss": record["val_loss"], **tracked})
        self._progress.evaluated(record)
        if record["step"] == 0:
            return  # nothing to draw yet, and drawing would keep the first step waiting
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

    def _track(self, step, values):
        for tracker in [*self._trackers]:
            try:
                tracker.log(values, step=step)
            except OSError as error:  # a full disk, a lost network: TensorBoard's writer does not come back from it
                self._say(
                    f"warning: {tracker.name} stops at step {step:,} ({error}); metrics.jsonl goes on, and when the "
                    "run is resumed, it does"
                )
                self._trackers.remove(tracker)

    def close(self, *, has_failed: bool = False) -> None:
        """Close the files and let the trackers send what they have; does nothing the second time."""
        if not self._is_main:
            return
        self._progress.close()
        self._metrics.close()
        while self._trackers:
            finish_tracker(self._trackers.pop(), has_failed=has_failed)

    def summary(self, *, val_loss, num_skipped, checkpoint):
        """What came of it, and what to do next."""
        if not self._is_main:
            return
        self._say(f"\ntrained for {format_duration(self._progress.training_seconds)}, evaluations and saving aside")
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
            WHAT_NEXT.format(
                folder=checkpoint.as_posix(),  # no backslashes inside Python's quotes
                quoted=shell_quote(checkpoint),
                curves=self._output_dir / "curves.png",
                metrics=f"{self.metrics_path}{show_board}",
            )
        )


WHAT_NEXT = """
checkpoint  {folder}
curves      {curves}
numbers     {metrics}

load    from transformers import AutoModelForCausalLM, AutoTokenizer
        model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained("{folder}", trust_remote_code=True)
sample  python sample.py {quoted} "Hello, I'm"
score   python -m eval --model {quoted} --tasks hellaswag
share   python -m hub push {quoted} USER/NAME    (after: hf auth login)"""
