"""What the commands of this room share: arguments, the device and the other processes, results, errors on one line."""

import dataclasses
import json
import os

import torch

from common import cli
from common.errors import one_line
from common.files import atomic_write, finite
from eval import EvalError
from eval.checkpoint import load_model, revision, weights_sha256
from eval.evaluator import score
from eval.lm_eval_bridge import PREFIX, LmEvalTask
from eval.published import GPT2, why_not_comparable
from eval.task import task_class, task_names


def add_task_arguments(parser):
    """What to score, and how: the same for every command that scores."""
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=["hellaswag"],
        metavar="TASK",
        help=f"of: {', '.join(task_names())}; or lm-eval:NAME, any task of the package lm-eval (default: hellaswag)",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="TASK=PATH",
        help="where a task's items are; PATH alone if there is one task. hellaswag: 'hub' (Rowan/hellaswag, the "
        "default), 'sample' (40 items of this project's own, for trying things out), or a .jsonl (.gz, .xz) file; "
        "lambada: 'hub' (EleutherAI/lambada_openai, the default), or such a file; bits_per_byte: a folder of "
        "shards, or text as `python -m data.prepare files` reads it",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="score only the first N items of each task")
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="bits_per_byte: tokens from window to window (default: half the context)",
    )
    parser.add_argument(
        "--tokens_per_batch",
        type=int,
        metavar="N",
        help="in a forward pass; fewer take less memory (default: by device)",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    parser.add_argument("--device", help="cuda, mps or cpu; by default the first of them that is there")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the modeling code of a model from the Hub"
    )


def tasks_of(args):
    """
    Returns:
        list of the tasks that the arguments ask for, with their settings.

    Raises:
        EvalError: a task that does not exist or is named twice, data or a setting for one that is not asked for.
    """
    for name in ("limit", "stride", "tokens_per_batch"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise EvalError(f"--{name} must be at least 1, got {value}")
    paths = {}
    for given in args.data:
        task, sign, path = given.partition("=")
        if not sign and len(args.tasks) == 1:
            task, path = args.tasks[0], given
        if task not in args.tasks:
            raise EvalError(f"--data {given!r}: say whose it is, TASK=PATH with one of {', '.join(args.tasks)}")
        if task in paths:
            raise EvalError(f"--data {task}={path}: {task} has {paths[task]!r} already; give one path")
        paths[task] = path
    tasks = []
    for name in args.tasks:
        if args.tasks.count(name) > 1:
            raise EvalError(f"--tasks {name!r} is named twice; once is enough")
        if name.startswith(PREFIX):
            if name in paths:
                raise EvalError(f"--data {name}={paths[name]}: lm-eval finds its data itself")
            tasks.append(LmEvalTask(name.removeprefix(PREFIX), args.limit))
            continue
        kind = task_class(name)
        settings = {"limit": args.limit}
        if name in paths:
            settings["data"] = paths[name]
        if "stride" in {field.name for field in dataclasses.fields(kind)}:
            settings["stride"] = args.stride
        tasks.append(kind(**settings))
    if args.stride is not None and not any(hasattr(task, "stride") for task in tasks):
        raise EvalError(f"--stride {args.stride}: is for bits_per_byte, which is not among --tasks")
    return tasks


def find_device(name):
    """
    The device to run on, once the other processes are found.

    Args:
        name: "cuda", "mps", "cpu", ...; None for the first that is there.

    Returns:
        (device as a str, whether this is the process that speaks)

    Raises:
        EvalError: there is no such device, or the launcher's processes do not see each other.
    """
    if name is None:
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1:
        from accelerate import PartialState

        state = PartialState(cpu=name == "cpu")
        if state.num_processes != launched:
            raise EvalError(
                f"the launcher started {launched} processes, but this one sees {state.num_processes}; launch with one "
                "of accelerate_configs/*.yaml that fits this machine"
            )
        return str(state.device), state.is_main_process
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise EvalError(f"--device {name!r} is not to be had ({one_line(error)}); try cpu") from error
    return name, True


def check_output(option, path):
    """Raises EvalError for a file that could not be written later."""
    if path.is_dir():
        raise EvalError(f"{option} {str(path)!r} is a folder; name a file in it")
    if path.exists() and not path.is_file():  # a device, a pipe: renaming would put a file in its place
        raise EvalError(f"{option} {str(path)!r} is no regular file; name one, or a new one")
    if not os.access(path.parent, os.W_OK):
        raise EvalError(
            f"{option} {str(path)!r}: there is no folder {str(path.parent)!r} that can be written to; make it first"
        )


def score_checkpoint(args, name, tokenizer, prepared, device, *, keep_answers=False):
    """
    Loads a model and scores it.

    Args:
        args: with dtype, tokens_per_batch and trust_remote_code, as `add_task_arguments` makes them.
        name: the checkpoint's folder, or its id on the Hub.
        tokenizer, prepared, keep_answers: as for `eval.evaluator.score`.
        device: as `find_device` gives it.

    Returns:
        dict: what `eval.evaluate` does, in "model" also its name, its revision and its weights' hash, and "published".
    """
    weights = weights_sha256(name)  # now: a folder may be written anew while it is scored
    model = load_model(name, dtype=args.dtype, device=device, trust_remote_code=args.trust_remote_code)
    result = score(
        model,
        tokenizer,
        prepared,
        tokens_per_batch=args.tokens_per_batch,
        progress=True,
        keep_answers=keep_answers,
    )
    result["model"] = {"name": name, "revision": revision(name), "weights_sha256": weights} | result["model"]
    beside, published = _published_beside(result)
    return result | {"published": {beside: published} if published else {}}


def _published_beside(result):
    """
    OpenAI's figures for what was scored in full: of the GPT-2 of the model's size, or of the smallest.

    Returns:
        (the model's name, {task: {figure: value}}), of which the dict may be empty.
    """
    size = (result["model"]["n_layer"], result["model"]["n_embd"])
    model = next((model for model in GPT2 if model.size == size), GPT2[0])
    return model.name, {
        task: model.results[task]
        for task, about in result["tasks"].items()
        if task in model.results
        and why_not_comparable(about["data"], result["results"][task]["n"], about["full_size"]) is None
    }


def write_json(option, path, content):
    """Without nan, which JSON does not have: null."""
    text = json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_aside(option, path, lambda tmp_path: tmp_path.write_text(text, encoding="utf-8", newline="\n"))


def write_aside(option, path, write):
    """Calls write(another path) and renames what it wrote, so that `path` is never half a file."""
    try:
        with atomic_write(path.resolve()) as tmp_path:  # where a link leads
            write(tmp_path)
    except OSError as error:
        raise EvalError(f"{option} {str(path)!r} cannot be written ({error})") from error


def run_command(command, arguments):
    """Run a command that scores; see `common.cli.run_command`. Too little memory is the user's to fix, too."""

    def run(arguments):
        try:
            command(arguments)
        except torch.OutOfMemoryError as error:
            raise EvalError(f"out of memory, use a smaller --tokens_per_batch ({one_line(error)})") from error

    return cli.run_command(run, arguments)
