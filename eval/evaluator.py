"""`eval.evaluate`: score a model on tasks, on one process or on several."""

import datetime
import platform
import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from common.terminal import progress_bar
from eval import EvalError
from eval.lm_eval_bridge import LmEvalTask, make_task
from eval.scoring import Config, Model, Tokenizer, max_length_of
from eval.task import BaseTask, LoadedTask, interleave_ranks, score_items


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    tasks: str | Sequence[str | BaseTask | LoadedTask] = ("hellaswag",),
    *,
    tokens_per_batch: int | None = None,
    progress: bool = False,
    keep_item_results: bool = False,
) -> dict[str, Any]:
    """Score a model. Under `accelerate launch`, every process scores its share and gets the full result.

    Args:
        model: a causal language model, on its device. An autocast around the call is respected.
        tasks: names ("hellaswag", "lambada", or "lm-eval:NAME" for a task of the package lm-eval), or tasks with
            settings: `eval.hellaswag.task.Task(data="hellaswag_val.jsonl", limit=100)`; or from `load_tasks`.
        tokens_per_batch: see `eval.scoring.loglikelihoods`.
        progress: show a progress bar on a terminal, and in a notebook with ipywidgets.
        keep_item_results: return each item's result too.

    Returns:
        a dict that JSON can hold except for nan (the standard error of a single item):
            results       {task: {metric: value, metric_stderr: value, "n": items, "num_truncated": items}}
            tasks         {task: {"version", "data": {"source", "sha256", "is_sample"}, "full_size", "seconds",
                          "figures": {metric: description}}}
            model         {"class", "parameters", "n_layer", "n_embd", "dtype", "device"}
            processes, versions, date
            item_results  {task: [a dict per item]}, if keep_item_results

    Raises:
        UserError: an unknown task, items that are missing or malformed, log-likelihoods that are not finite.
    """
    import transformers

    results, descriptions, all_item_results = {}, {}, {}
    state = PartialState()
    for task, items, data in load_tasks(tasks, tokenizer, model.config):
        name, start = task.name, time.perf_counter()
        if isinstance(task, LmEvalTask):
            results[name], descriptions[name] = task.score(model, tokenizer)
        else:
            own = items[state.process_index :: state.num_processes]
            total = sum(len(request.continuations) for item in own for request in item.requests)
            is_shown = progress and state.is_main_process
            with progress_bar(is_shown=is_shown, total=total, desc=name, unit="continuation", leave=False) as bar:
                share = score_items(task, model, own, tokens_per_batch=tokens_per_batch, on_batch=bar.update)
            all_item_results[name] = interleave_ranks(gather_object([share]))
            results[name] = task.aggregate(all_item_results[name])
            descriptions[name] = {
                "version": task.version,
                "data": {"source": data.description, "sha256": data.sha256, "is_sample": data.is_sample},
                "figures": {metric: text for metric, text in task.metrics.items() if metric in results[name]},
                "full_size": task.full_size,
            }
        descriptions[name]["seconds"] = round(time.perf_counter() - start, 3)
    parameters = list(model.parameters())
    return {
        "results": results,
        "tasks": descriptions,
        "model": {
            "class": type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in parameters),
            "n_layer": getattr(model.config, "num_hidden_layers", None),
            "n_embd": getattr(model.config, "hidden_size", None),
            "dtype": str(parameters[0].dtype).removeprefix("torch."),
            "device": parameters[0].device.type,
        },
        "processes": state.num_processes,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **({"item_results": all_item_results} if keep_item_results else {}),
    }


def load_tasks(
    tasks: str | Sequence[str | BaseTask | LoadedTask], tokenizer: Tokenizer, config: Config
) -> list[LoadedTask]:
    """Load the items of all tasks, so that errors in them are found before anything is scored."""
    # transformers returns a tokenizer with a vocabulary of 0 for a folder without tokenizer files.
    if not callable(tokenizer) or getattr(tokenizer, "vocab_size", None) == 0:
        raise EvalError(f"the model has no tokenizer (got {tokenizer!r:.80}); give the one that it was trained with")
    loaded: dict[str, LoadedTask] = {}
    for task in [tasks] if isinstance(tasks, str) else tasks:
        if isinstance(task, str):
            task = make_task(task)
        if task.name in loaded:
            raise EvalError(f"{task.name} is listed twice, and results go by that name; evaluate one after the other")
        loaded[task.name] = task if isinstance(task, LoadedTask) else task.load(tokenizer, max_length_of(config))
    hashes = tuple(task.data.sha256 for task in loaded.values())
    if len(set(gather_object([hashes]))) > 1:
        raise EvalError("the processes loaded different items; give each of them the same files with --data")
    return list(loaded.values())
