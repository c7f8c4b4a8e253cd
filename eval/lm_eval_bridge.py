"""`--tasks lm-eval:NAME`: any task of the package lm-eval, scored by that package on our model."""

import contextlib
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from eval import EvalError
from eval.items import DataInfo
from eval.scoring import Model, Tokenizer, in_eval_mode
from eval.task import BaseTask, LoadedTask, task_class

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

PREFIX = "lm-eval:"
BATCH_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class LmEvalTask(BaseTask):
    """A task or group of lm-eval. Its items and metrics are known only after it is scored."""

    task: str
    """its name in lm-eval; FOLDER/NAME for a .yaml file of your own in that folder"""

    @property
    def name(self) -> str:
        """The name in `--tasks` and in results."""
        return PREFIX + self.task

    def load(self, tokenizer: Tokenizer, max_length: int | None = None) -> LoadedTask:
        """Return the task without items. Raises EvalError, see `find`."""
        self.find()
        return LoadedTask(self, [], DataInfo(description=self.name, sha256=""))

    def find(self) -> tuple["TaskManager", str]:
        """Return lm-eval's TaskManager and the task's name in it.

        Raises:
            EvalError: lm-eval is not installed or does not know the task, or there are several processes.
        """
        if PartialState().num_processes > 1:
            raise EvalError(f"{self.name}: tasks of lm-eval are scored by one process; start only one")
        try:
            import lm_eval.tasks
        except ImportError as error:
            raise EvalError(
                f"{self.name}: the package lm-eval cannot be imported ({error}); pip install 'lm-eval[hf]>=0.4.13'"
            ) from error
        folder, _, name = self.task.rpartition("/")
        if folder and not Path(folder).is_dir():
            raise EvalError(
                f"{self.name}: the folder {folder!r} does not exist; give FOLDER/NAME of a task's .yaml file"
            )
        manager = _task_manager(folder)
        if not manager.match_tasks([name]):
            raise EvalError(
                f"{self.name}: lm-eval {lm_eval.__version__} has no task {name!r}; `lm-eval ls tasks` lists them"
            )
        return manager, name

    def score(self, model: Model, tokenizer: Tokenizer) -> tuple[dict[str, float], dict[str, Any]]:
        """Return the task's values of "results" and of "tasks" in what `eval.evaluate` returns.

        Metrics of a group's tasks are named "TASK/metric".

        Raises:
            EvalError: see `find`; or lm-eval fails, for instance without the task's data.
        """
        manager, name = self.find()
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        # None: leave the caller's random states alone
        seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"))
        try:
            with in_eval_mode(model), contextlib.redirect_stdout(sys.stderr):  # its progress goes to stderr
                output = lm_eval.simple_evaluate(
                    model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE),
                    tasks=[name],
                    limit=self.limit,
                    task_manager=manager,
                    bootstrap_iters=1000,
                    **seeds,
                )
        except Exception as error:  # a dataset that is not available raises any class of exception
            raise EvalError(f"{self.name}: lm-eval could not score it ({type(error).__name__}: {error})") from error
        metrics: dict[str, float] = {}
        for subtask, values in output["results"].items():
            prefix = "" if subtask == name else f"{subtask}/"
            for key, value in values.items():
                metric, _, filter_name = key.partition(",")  # keys are "acc,none", "acc_stderr,none", ...
                if filter_name and isinstance(value, int | float):
                    kind = "_stderr" if metric.endswith("_stderr") else ""
                    name_of_filter = "" if filter_name == "none" else f" ({filter_name})"
                    metrics[f"{prefix}{metric.removesuffix('_stderr')}{name_of_filter}{kind}"] = value
            if subtask in output["n-samples"]:
                metrics[f"{prefix}n"] = output["n-samples"][subtask]["effective"]
        package = f"lm-eval {lm_eval.__version__}"
        limit = f", the first {self.limit} items" if self.limit else ""
        figures = [key for key in metrics if not key.endswith(("_stderr", "/n")) and key != "n"]
        return metrics, {
            "version": ", ".join(f"{subtask} {number}" for subtask, number in output["versions"].items()),
            "data": {"source": f"{package}, {name}{limit}", "sha256": None, "is_sample": False},
            "figures": dict.fromkeys(figures, package),
            "full_size": None,
        }


@functools.cache
def _task_manager(folder: str) -> "TaskManager":
    """Return a TaskManager, which reads all of lm-eval's tasks (seconds), and those in `folder` unless it is ""."""
    import lm_eval.tasks

    return lm_eval.tasks.TaskManager(include_path=folder or None)


def make_task(name: str, **settings: Any) -> BaseTask:
    """Return a task by its name, also lm-eval:NAME. Raises EvalError if one of ours does not exist."""
    if name.startswith(PREFIX):
        return LmEvalTask(task=name.removeprefix(PREFIX), **settings)
    return task_class(name)(**settings)
