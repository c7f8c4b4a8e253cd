"""Shared by `python -m eval` and `python -m eval.miniseries`: arguments, device and processes, result files."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from common import cli
from common.errors import one_line
from common.files import atomic_write, finite
from common.models import find_device, load_model, revision
from common.weights import weights_sha256
from eval import EvalError
from eval.evaluator import evaluate
from eval.lm_eval_bridge import PREFIX, make_task
from eval.published import GPT2, not_comparable_reason
from eval.scoring import Tokenizer
from eval.task import BaseTask, LoadedTask, task_names


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that select and configure tasks."""
    add, names = parser.add_argument, ", ".join(task_names())
    about = f"one or more of {names}; or lm-eval:NAME for any task of the package lm-eval (default: hellaswag)"
    add("--tasks", nargs="+", default=["hellaswag"], metavar="TASK", help=about)
    about = (
        "where a task's items are; just PATH if there is one task. hellaswag: 'hub' (Rowan/hellaswag, the default), "
        "'sample' (40 items written for this project, for trying things out), or a .jsonl file (also .gz, .xz, .zst); "
        "lambada: 'hub' (EleutherAI/lambada_openai, the default), or such a file; blimp: 'hub' (nyu-mll/blimp, the "
        "default), or such a file; wikitext: 'hub' (EleutherAI/wikitext_document_level, the default), wiki.test.raw or "
        "its pages or rows as .jsonl or .parquet; core: the bundle of its tasks, a folder or .zip; bits_per_byte: a "
        "folder of shards, or text as `python -m data.prepare files` reads it"
    )
    add("--data", nargs="+", default=[], metavar="TASK=PATH", help=about)
    add("--limit", type=int, metavar="N", help="score only the first N items of each task")
    about = "bits_per_byte: tokens per window after the first (default: half the context)"
    add("--stride", type=int, metavar="N", help=about)
    about = "tokens per forward pass; fewer need less memory (default: depends on the device)"
    add("--tokens_per_batch", type=int, metavar="N", help=about)
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights (default: float32)")
    add("--device", help="cuda, mps or cpu (default: the first one available)")
    add("--trust_remote_code", action="store_true", help="run the modeling code of a model from the Hub")


def tasks_of(args: argparse.Namespace) -> list[BaseTask]:
    """Return the tasks that the arguments select, with their settings.

    Raises:
        EvalError: an unknown or repeated task, data or a setting for a task that is not selected.
    """
    for name in ("limit", "stride", "tokens_per_batch"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise EvalError(f"--{name} must be at least 1, got {value}")
    if args.stride is not None and "bits_per_byte" not in args.tasks:
        raise EvalError(f"--stride {args.stride}: it is for bits_per_byte, which is not among --tasks")
    paths = _paths_of(args.data, args.tasks)
    tasks = []
    for name in args.tasks:
        if args.tasks.count(name) > 1:
            raise EvalError(f"--tasks {name!r} is listed twice; list it once")
        if name in paths and name.startswith(PREFIX):
            raise EvalError(f"--data {name}={paths[name]}: lm-eval finds its own data; leave it out")
        settings = {"data": paths[name]} if name in paths else {}
        settings |= {"stride": args.stride} if name == "bits_per_byte" else {}
        tasks.append(make_task(name, limit=args.limit, **settings))
    return tasks


def _paths_of(data: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    """Return {task: path} for the values of --data."""
    paths: dict[str, str] = {}
    for value in data:
        name, sign, path = value.partition("=")
        if not sign and len(tasks) == 1:
            name, path = tasks[0], value
        if name not in tasks:
            raise EvalError(f"--data {value!r} must be TASK=PATH, with TASK one of {', '.join(tasks)}")
        if name in paths:
            raise EvalError(f"--data {name}={path}: {name} already has {paths[name]!r}; give one path")
        paths[name] = path
    return paths


def join_processes(device: str | None) -> tuple[str, bool]:
    """Connect to the launcher's other processes. Return (this process's device, True on the main process).

    Raises:
        UserError: the device is not available, or the launcher's processes are not connected.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return find_device(device), True
    state = PartialState(cpu=device == "cpu" or (device is None and not torch.accelerator.is_available()))
    cli.check_world_size(state.num_processes)
    return str(state.device), state.is_main_process


def check_output(option: str, path: Path) -> None:
    """Raise EvalError if the file could not be written later."""
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except OSError as error:  # for example, the name is too long
        raise EvalError(f"{option} {str(path)!r} cannot be written ({error.strerror}); name another file") from error
    if path.is_dir():
        raise EvalError(f"{option} {str(path)!r} is a folder; name a file in it")
    if path.exists() and not path.is_file():  # a device or a pipe, which renaming would replace by a file
        raise EvalError(f"{option} {str(path)!r} is not a regular file; name one, or a new one")
    if not os.access(path.parent, os.W_OK):
        raise EvalError(f"{option} {str(path)!r}: the folder {str(path.parent)!r} is not writable; create it first")


def score_checkpoint(
    args: argparse.Namespace,
    name: str,
    tokenizer: Tokenizer,
    tasks: Sequence[LoadedTask],
    device: str,
    *,
    keep_item_results: bool = False,
) -> dict[str, Any]:
    """Load a model and score it with the settings in `args`, see `add_task_arguments`.

    Returns:
        the result of `eval.evaluate`, with the model's name, revision and weights hash in "model", and "published".

    Raises:
        UserError: the model cannot be opened or scored, or does not fit the memory.
    """
    weights = weights_sha256(name)  # before scoring: the folder may be overwritten meanwhile
    try:
        model = load_model(name, dtype=args.dtype, device=device, trust_remote_code=args.trust_remote_code)
        result = evaluate(
            model,
            tokenizer,
            tasks,
            tokens_per_batch=args.tokens_per_batch,
            progress=True,
            keep_item_results=keep_item_results,
        )
    except torch.OutOfMemoryError as error:
        raise EvalError(f"out of memory; use a smaller --tokens_per_batch ({one_line(error)})") from error
    result["model"] = {"name": name, "revision": revision(name), "weights_sha256": weights} | result["model"]
    return result | {"published": _published_results(result)}


def _published_results(result: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Return {model: {task: {metric: value}}} of OpenAI's GPT-2 of this size (or the smallest), for full tasks only."""
    size = (result["model"]["n_layer"], result["model"]["n_embd"])
    model = next((model for model in GPT2 if model.size == size), GPT2[0])
    published = {
        name: model.results[name]
        for name, task in result["tasks"].items()
        if name in model.results
        and not_comparable_reason(task["data"], result["results"][name]["n"], task["full_size"]) is None
    }
    return {model.name: published} if published else {}


def write_json(option: str, path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file, with null for numbers that are not finite; see `write_output`."""
    write_output(option, path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_output(option: str, path: Path, content: str | bytes) -> None:
    """Write a file atomically (text as UTF-8), and raise EvalError if that fails. A link is followed, not replaced."""
    try:
        with atomic_write(path.resolve()) as tmp_path:
            tmp_path.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise EvalError(f"{option} {str(path)!r} cannot be written ({error})") from error
