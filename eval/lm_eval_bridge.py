"""`--tasks lm-eval:NAME`: any task of the package lm-eval, scored by that package on our model."""

import contextlib
import functools
import sys
from dataclasses import dataclass
from pathlib import Path

from eval import EvalError
from eval.processes import rank_and_number
from eval.scoring import in_eval_mode

PREFIX = "lm-eval:"
BATCH_SIZE = 16


@dataclass(frozen=True)
class LmEvalTask:
    """A task or group of lm-eval."""

    task: str
    """its name there; FOLDER/NAME for one of your own, whose .yaml is in that folder"""
    limit: int | None = None
    """the first so many items of each task"""

    @property
    def name(self):
        """What it is called here."""
        return PREFIX + self.task


def check_lm_eval(wanted):
    """
    Returns:
        (lm_eval's TaskManager, the task's name)

    Raises:
        EvalError: lm-eval is not installed or does not know the task; more than one process.
    """
    if rank_and_number()[1] > 1:
        raise EvalError(f"{wanted.name}: tasks of lm-eval are scored by one process here; start one")
    try:
        import lm_eval.tasks
    except ImportError as error:
        raise EvalError(
            f"{wanted.name}: the package lm-eval cannot be imported ({error}); pip install 'lm-eval[hf]>=0.4.13'"
        ) from error
    folder, _, name = wanted.task.rpartition("/")
    if folder and not Path(folder).is_dir():
        raise EvalError(f"{wanted.name}: there is no folder {folder!r}")
    manager = _task_manager(folder)
    if not manager.match_tasks([name]):
        raise EvalError(
            f"{wanted.name}: lm-eval {lm_eval.__version__} has no task {name!r}; `lm-eval ls tasks` lists them"
        )
    return manager, name


@functools.cache
def _task_manager(folder):
    """lm-eval's, which takes seconds to read all its tasks; and those in a folder of one's own, "" for none."""
    import lm_eval.tasks

    return lm_eval.tasks.TaskManager(include_path=folder or None)


def score_with_lm_eval(wanted, model, tokenizer):
    """
    Args:
        wanted: LmEvalTask.

    Returns:
        (figures, about): {figure: value, figure_stderr: value, "n": items}, those of a group's tasks as "TASK/figure";
        and {"version", "data", "figures", "full_size"} as of our own tasks, from what lm-eval says.

    Raises:
        EvalError: as `check_lm_eval`, and where lm-eval fails, without the task's data for instance.
    """
    manager, name = check_lm_eval(wanted)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"))  # the caller's states stay
    try:
        with in_eval_mode(model), contextlib.redirect_stdout(sys.stderr):  # where its progress goes
            found = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE),
                tasks=[name],
                limit=wanted.limit,
                task_manager=manager,
                bootstrap_iters=1000,
                **seeds,
            )
    except Exception as error:  # a data set that is not to be had raises whatever its library does
        raise EvalError(f"{wanted.name}: lm-eval could not score it ({type(error).__name__}: {error})") from error
    figures = {}
    for task, values in found["results"].items():
        before = "" if task == name else f"{task}/"
        for key, value in values.items():
            figure, _, kind = key.partition(",")  # "acc,none", "acc_stderr,none": the filter's name at the end
            if kind and isinstance(value, int | float):
                figures[before + figure + ("" if kind == "none" else f" ({kind})")] = value
        if task in found["n-samples"]:
            figures[f"{before}n"] = found["n-samples"][task]["effective"]
    version = ", ".join(f"{task} {number}" for task, number in found["versions"].items())
    limit = f", the first {wanted.limit} items" if wanted.limit else ""
    return figures, {
        "version": version,
        "data": {"source": f"lm-eval {lm_eval.__version__}, {name}{limit}", "sha256": None, "is_sample": False},
        "figures": {
            figure: f"lm-eval {lm_eval.__version__}"
            for figure in figures
            if not figure.endswith(("_stderr", "/n")) and figure != "n"
        },
        "full_size": None,
    }
