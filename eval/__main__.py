"""
python -m eval --model CHECKPOINT --tasks hellaswag lambada bits_per_byte lm-eval:NAME [--data TASK=PATH ...] ...

CHECKPOINT is a folder as train.py writes it (checkpoints/step_...), any other that `from_pretrained` opens,
or the id of a model on the Hub. Prints a table; --output also writes it as JSON, with what is needed to get
the same again. Several GPUs share the items: accelerate launch -m eval --model CHECKPOINT ...
"""

import json
import logging
import sys
from pathlib import Path

from common.cli import Parser, prepare_process

if __name__ == "__main__":
    prepare_process()

from eval import EvalError
from eval.checkpoint import check_name, load_tokenizer
from eval.command import (
    add_task_arguments,
    check_output,
    find_device,
    run_command,
    score_checkpoint,
    tasks_of,
    write_aside,
    write_json,
)
from eval.evaluator import prepare
from eval.lm_eval_bridge import LmEvalTask


def _parse_arguments(arguments):
    parser = Parser(
        prog="python -m eval",
        description="Scores a language model. Several GPUs share the items: accelerate launch -m eval --model ...",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="CHECKPOINT",
        help="a checkpoint folder, or the id of a model on the Hub. Modeling code in the folder is run "
        "(train.py saves it with the weights), modeling code from the Hub only with --trust_remote_code",
    )
    add_task_arguments(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results to FILE, as JSON")
    parser.add_argument(
        "--per_item", type=Path, metavar="FILE", help="write each item's log-likelihoods to FILE, .jsonl or .parquet"
    )
    return parser.parse_args(arguments)


def _table(args, device, result):
    [(name, published)] = result["published"].items() or [(None, {})]
    rows = [("task", "figure", "value", *([name] if published else []), "")]
    for task, figures in result["results"].items():
        about = result["tasks"][task]
        for figure, what in about["figures"].items():
            value = figures[figure]
            text = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
            if isinstance(error := figures.get(f"{figure}_stderr"), float):
                text += f" ± {error:.4f}"
            beside = published.get(task, {}).get(figure)
            cells = [f"{beside:.4f}" if beside is not None else ""] if published else []
            rows.append((task, figure, text, *cells, what))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += ["", f"model  {args.model} ({args.dtype}, {device}, {result['model']['parameters']:,} parameters)"]
    for task, about in result["tasks"].items():
        figures, seconds = result["results"][task], about["seconds"]
        n = figures.get("n")
        rate = f", {n:,} items, {n / max(seconds, 1e-3):.1f} a second" if n else ""
        lines += [f"items  {task}: {about['data']['source']}", f"time   {task}: {seconds:.1f} seconds{rate}"]
        if figures.get("num_cut"):
            lines.append(
                f"note   {task}: {figures['num_cut']} of {n} items were longer than the model's context and lost "
                "their beginning"
            )
    return "\n".join(lines)


def _write_answers(path, answers):
    """A row an item; a column that a task does not have is null in its rows."""
    rows = [
        {"task": task, "item": i, **answer} for task, of_task in answers.items() for i, answer in enumerate(of_task)
    ]
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_aside("--per_item", path, lambda aside: aside.write_text(text, encoding="utf-8", newline="\n"))
        return
    import pyarrow
    import pyarrow.parquet

    names = dict.fromkeys(name for row in rows for name in row)
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    write_aside("--per_item", path, lambda aside: pyarrow.parquet.write_table(table, aside))


def _main(arguments):
    args = _parse_arguments(arguments)
    tasks = tasks_of(args)
    if args.per_item is not None and args.per_item.suffix not in (".jsonl", ".parquet"):
        raise EvalError(f"--per_item {str(args.per_item)!r} must end in .jsonl or .parquet")
    if args.per_item is not None and any(isinstance(task, LmEvalTask) for task in tasks):
        raise EvalError("--per_item: lm-eval keeps the items of its tasks to itself; score those without it")
    args.model = check_name(args.model)
    device, speaks = find_device(args.device)
    for name in ("output", "per_item"):
        if speaks and getattr(args, name) is not None:
            check_output(f"--{name}", getattr(args, name))

    tokenizer, config = load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
    prepared = prepare(tasks, tokenizer, config)
    for task in prepared:
        if speaks and task.source is not None and task.source.is_sample:
            print(f"warning: {task.source.description}", file=sys.stderr)
    result = score_checkpoint(args, args.model, tokenizer, prepared, device, keep_answers=args.per_item is not None)
    if not speaks:
        return
    print(_table(args, device, result))
    if args.per_item is not None:
        _write_answers(args.per_item, result.pop("answers"))
    if args.output is not None:
        write_json("--output", args.output, result)


def main(arguments=None):
    """
    Returns:
        exit code: 0, or 2 for what the user can mend, said on one line of stderr.
    """
    return run_command(_main, arguments)


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # the libraries' chatter; what matters of it is checked and said here
    sys.exit(main())
