"""Score a language model.

python -m eval --model CHECKPOINT --tasks hellaswag lambada bits_per_byte lm-eval:NAME [--data TASK=PATH ...] ...

CHECKPOINT is a folder written by train.py (checkpoints/step_...), any other folder that `from_pretrained` opens, or
the id of a model on the Hub. Prints a table; --output also writes it as JSON, with everything needed to reproduce it.
Several GPUs share the items: accelerate launch -m eval --model CHECKPOINT ...
"""

import argparse
import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.cli import Parser, prepare_process, run_command

if __name__ == "__main__":
    prepare_process()

from common.models import check_name, load_tokenizer
from eval import EvalError
from eval.command import (
    add_task_arguments,
    check_output,
    join_processes,
    score_checkpoint,
    tasks_of,
    write_json,
    write_output,
)
from eval.evaluator import load_tasks
from eval.lm_eval_bridge import PREFIX


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m eval",
        description="Score a language model. Several GPUs share the items: accelerate launch -m eval --model ...",
        allow_abbrev=False,
    )
    about = (
        "a checkpoint folder, or the id of a model on the Hub. Modeling code in the folder is run (train.py saves it "
        "with the weights), modeling code from the Hub only with --trust_remote_code"
    )
    parser.add_argument("--model", required=True, metavar="CHECKPOINT", help=about)
    add_task_arguments(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results to FILE, as JSON")
    about = "write each item's log-likelihoods to FILE, a .jsonl file"
    parser.add_argument("--per_item", type=Path, metavar="FILE", help=about)
    return parser.parse_args(arguments)


def _format_table(args: argparse.Namespace, device: str, result: dict[str, Any]) -> str:
    [(published_name, published)] = result["published"].items() or [("", {})]
    rows = [("task", "metric", "value", published_name, "")]
    notes = ["", f"model  {args.model} ({args.dtype}, {device}, {result['model']['parameters']:,} parameters)"]
    for name, task in result["tasks"].items():
        metrics, seconds = result["results"][name], task["seconds"]
        for metric, description in task["figures"].items():
            value, error = metrics[metric], metrics.get(f"{metric}_stderr")
            text = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
            if isinstance(error, float) and not math.isnan(error):  # nan: of a single item
                text += f" ± {error:.4f}"
            published_value = published.get(name, {}).get(metric)
            rows.append((name, metric, text, f"{published_value:.4f}" if published_value else "", description))
        n = metrics.get("n")
        rate = f", {n:,} items, {n / max(seconds, 1e-3):.1f} per second" if n else ""
        notes += [f"items  {name}: {task['data']['source']}", f"time   {name}: {seconds:.1f} seconds{rate}"]
        if truncated := metrics.get("num_truncated"):
            notes.append(
                f"note   {name}: {truncated} of {n} items did not fit the model's context and lost their beginning"
            )
    columns = [column for column in zip(*rows, strict=True) if any(column)]
    widths = [max(map(len, column)) for column in columns]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in zip(*columns, strict=True)]
    return "\n".join(lines + notes)


def _main(arguments: Sequence[str] | None) -> None:
    args = _parse_arguments(arguments)
    tasks = tasks_of(args)
    if args.per_item is not None and args.per_item.suffix != ".jsonl":
        raise EvalError(f"--per_item {str(args.per_item)!r} must end in .jsonl, one JSON object per item")
    if args.per_item is not None and any(name.startswith(PREFIX) for name in args.tasks):
        raise EvalError("--per_item: not available for lm-eval's tasks; score those without it")
    args.model = check_name(args.model)
    device, is_main_process = join_processes(args.device)
    for name in ("output", "per_item"):
        if is_main_process and getattr(args, name) is not None:
            check_output(f"--{name}", getattr(args, name))

    tokenizer, config = load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
    loaded = load_tasks(tasks, tokenizer, config)
    for task in loaded:
        if is_main_process and task.data.is_sample:
            print(f"warning: {task.data.description}", file=sys.stderr)
    keep_item_results = args.per_item is not None
    result = score_checkpoint(args, args.model, tokenizer, loaded, device, keep_item_results=keep_item_results)
    if not is_main_process:
        return
    print(_format_table(args, device, result))
    if args.per_item is not None:
        lines = [
            json.dumps({"task": name, "item": index, **item_result}, ensure_ascii=False)
            for name, item_results in result.pop("item_results").items()
            for index, item_result in enumerate(item_results)
        ]
        write_output("--per_item", args.per_item, "".join(f"{line}\n" for line in lines))
    if args.output is not None:
        write_json("--output", args.output, result)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 2 for an error that the user can fix, on one line of stderr."""
    return run_command(_main, arguments)


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # of the libraries; what matters is checked and reported here
    sys.exit(main())
