"""`eval.evaluate`: scores a model on tasks, alone or together with other processes."""

import datetime
import platform
import time
from typing import NamedTuple

import torch

from eval import EvalError
from eval.items import Source
from eval.lm_eval_bridge import PREFIX, LmEvalTask, check_lm_eval, score_with_lm_eval
from eval.processes import gather, rank_and_number
from eval.scoring import context_of
from eval.task import BaseTask, Item, answer_items, in_order, joint_results, task_class


def evaluate(model, tokenizer, tasks=("hellaswag",), *, tokens_per_batch=None, progress=False, keep_answers=False):
    """
    Scores a model. Where processes are joined in a process group (`accelerate launch`), each of them calls this with a
    copy of the model, answers its share of the items, and gets the result of all.

    Args:
        model: a causal language model of transformers' kind, on its device. An autocast around the call is respected.
        tokenizer: its Hugging Face tokenizer.
        tasks: names ("hellaswag", "lambada"; "lm-eval:NAME" for one of the package lm-eval), or tasks with settings:
            `eval.hellaswag.task.Task(data="hellaswag_val.jsonl", limit=100)`.
        tokens_per_batch: see `eval.scoring.loglikelihoods`.
        progress: show a bar, on a terminal.
        keep_answers: return each item's answer too.

    Returns:
        dict, plain and JSON-able but for nan (the standard error of a single item):
            results     {task: {figure: value, figure_stderr: value, "n": items, "num_cut": items that were cut}}
            tasks       {task: {"version", "data": {"source", "sha256", "is_sample"}, "figures": {figure: what it is},
                        "full_size", "seconds"}}
            model       {"class", "parameters", "n_layer", "n_embd", "dtype", "device"}
            processes, versions, date
            answers     {task: [a dict an item]}, with keep_answers

    Raises:
        EvalError: no such task, items that are not there or wrong, a model whose results are not finite.
    """
    return score(
        model,
        tokenizer,
        prepare(tasks, tokenizer, model.config),
        tokens_per_batch=tokens_per_batch,
        progress=progress,
        keep_answers=keep_answers,
    )


class Prepared(NamedTuple):
    """A task whose items are loaded."""

    task: BaseTask | LmEvalTask
    items: list[Item]
    """none where lm-eval loads them"""
    source: Source | None


def prepare(tasks, tokenizer, config):
    """
    Loads the items of all tasks, so that what is wrong with them is known before anything is scored.

    Args:
        tasks, tokenizer: as for `evaluate`.
        config: the model's.

    Returns:
        list of Prepared.
    """
    # A vocabulary of 0 is what transformers makes of a folder without tokenizer files.
    if not callable(tokenizer) or getattr(tokenizer, "vocab_size", None) == 0:
        raise EvalError(f"the model has no tokenizer (got {tokenizer!r:.80}); give the one that it was trained with")
    prepared = []
    for task in [tasks] if isinstance(tasks, str) else tasks:
        if isinstance(task, str):
            task = LmEvalTask(task.removeprefix(PREFIX)) if task.startswith(PREFIX) else task_class(task)()
        if isinstance(task, LmEvalTask):
            check_lm_eval(task)
            prepared.append(Prepared(task, [], None))
        else:
            items, source = task.load(tokenizer, context_of(config))
            prepared.append(Prepared(task, items, source))
        if task.name in [other.task.name for other in prepared[:-1]]:
            raise EvalError(f"{task.name} is there twice, and results go by that name; evaluate them in turns")
    if len({tuple(sources) for sources in gather([p.source and p.source.sha256 for p in prepared])}) > 1:
        raise EvalError("the processes found different items; give each of them the same files, with --data")
    return prepared


def score(model, tokenizer, prepared, *, tokens_per_batch=None, progress=False, keep_answers=False):
    """What `evaluate` does, and returns, once the items are there."""
    from tqdm import tqdm

    rank, number = rank_and_number()
    results, about, all_answers = {}, {}, {}
    for task, items, source in prepared:
        name, start = task.name, time.perf_counter()
        if isinstance(task, LmEvalTask):
            results[name], about[name] = score_with_lm_eval(task, model, tokenizer)
        else:
            mine = items[rank::number]
            total = sum(len(request.continuations) for item in mine for request in item.requests)
            # disable=None: no bar where the output is no terminal
            hidden = None if progress and rank == 0 else True
            with tqdm(total=total, desc=name, unit="continuation", disable=hidden, leave=False) as bar:
                answers = answer_items(task, model, mine, tokens_per_batch=tokens_per_batch, on_batch=bar.update)
            all_answers[name] = in_order(gather(answers))
            results[name] = joint_results(task, all_answers[name])
            about[name] = {
                "version": task.version,
                "data": {"source": source.description, "sha256": source.sha256, "is_sample": source.is_sample},
                "figures": {figure: what for figure, what in task.figures.items() if figure in results[name]},
                "full_size": task.full_size,
            }
        about[name]["seconds"] = round(time.perf_counter() - start, 3)
    import transformers

    return {
        "results": results,
        "tasks": about,
        "model": _description(model),
        "processes": number,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **({"answers": all_answers} if keep_answers else {}),
    }


def _description(model):
    parameters = list(model.parameters())
    config = model.config
    return {
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "n_layer": getattr(config, "num_hidden_layers", None),
        "n_embd": getattr(config, "hidden_size", None),
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "device": parameters[0].device.type,
    }
