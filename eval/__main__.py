"""
python -m eval --model CHECKPOINT --tasks hellaswag [--data FILE] [--limit N] [--output FILE] ...

CHECKPOINT is a folder as train.py writes it (checkpoints/step_...), any other that `from_pretrained` opens,
or the id of a model on the Hub. Prints a table; --output also writes it as JSON, with what is needed to get
the same again.
"""

import argparse
import difflib
import json
import logging
import math
import os
import platform
import sys
import time
from pathlib import Path

import torch

from eval import EvalError
from eval.hellaswag.items import NUM_VALIDATION_ITEMS, load_items
from eval.hellaswag.task import score_hellaswag
from eval.hub import why_unreachable

TASKS = ("hellaswag",)

# OpenAI's weights, scored this way on all of HellaSwag's validation items: build-nanogpt, hellaswag.py. A
# local copy whose text was cleaned (of the "[title]" tags, say) gives slightly other numbers.
PUBLISHED = {"model": "OpenAI GPT-2 124M", "acc": 0.2859, "acc_norm": 0.2955}


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse's own prints the whole usage first
        raise EvalError(f"{message} (see python -m eval --help)")


def _parse_arguments(arguments):
    parser = _Parser(prog="python -m eval", description="Scores a language model.", allow_abbrev=False)
    parser.add_argument(
        "--model",
        required=True,
        metavar="CHECKPOINT",
        help="a checkpoint folder, or the id of a model on the Hub. Modeling code in the folder is run "
        "(train.py saves it with the weights), modeling code from the Hub only with --trust_remote_code",
    )
    parser.add_argument("--tasks", nargs="+", default=["hellaswag"], help=f"of: {', '.join(TASKS)}")
    parser.add_argument(
        "--data",
        default="hub",
        metavar="FILE",
        help="the items: a .jsonl, .jsonl.gz or .jsonl.xz file with the fields ctx, endings and label; 'hub' "
        "(Rowan/hellaswag, the default); 'sample' (40 items of this project's own, for trying things out)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="score only the first N items")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result to FILE, as JSON")
    parser.add_argument("--batch_size", type=int, default=32, metavar="N", help="sequences in a forward pass")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    parser.add_argument("--device", help="cuda, mps or cpu; by default the first of them that is there")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the modeling code of a model from the Hub"
    )
    return parser.parse_args(arguments)


def _check_arguments(args):
    """What can be known to fail before anything is loaded."""
    for task in args.tasks:
        if task not in TASKS:
            near = difflib.get_close_matches(task, TASKS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(TASKS)}"
            raise EvalError(f"--tasks {task!r}: no such task; {hint}")
    for name in ("limit", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise EvalError(f"--{name} must be at least 1, got {value}")
    if args.output is not None:
        if args.output.is_dir():
            raise EvalError(f"--output {str(args.output)!r} is a folder; name a file in it")
        if not os.access(args.output.parent, os.W_OK):
            raise EvalError(
                f"--output {str(args.output)!r}: there is no folder {str(args.output.parent)!r} that can be "
                "written to; make it first"
            )
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        raise EvalError(f"--device {args.device!r} is not to be had ({_one_line(error)}); try cpu") from error
    _check_model_name(args.model)


def _check_model_name(model):
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            inside = sorted([*folder.glob("*/config.json"), *folder.glob("*/*/config.json")])
            hint = f"did you mean {str(inside[-1].parent)!r}?" if inside else "give the folder that holds it"
            raise EvalError(f"--model {model!r} has no config.json, so it is no checkpoint; {hint}")
    elif folder.exists():
        raise EvalError(f"--model {model!r} is a file; give the folder it is in")
    else:
        try:
            validate_repo_id(model)
        except HFValidationError as error:
            raise EvalError(f"--model {model!r}: no such folder, nor a Hub id (owner/name)") from error


def _load_model(args):
    """
    Returns:
        (tokenizer, model on the device)
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    is_local = Path(args.model).is_dir()
    why = None if is_local else why_unreachable()
    options = {
        "trust_remote_code": is_local or args.trust_remote_code,
        "local_files_only": is_local or why is not None,  # straight to the cache, see why_unreachable
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model, **options)
        if tokenizer.vocab_size == 0:  # what transformers makes of a folder without tokenizer files
            raise EvalError(f"--model {args.model!r} has no tokenizer; put one there with tokenizer.save_pretrained")
        model, loading = AutoModelForCausalLM.from_pretrained(
            args.model,
            dtype=getattr(torch, args.dtype),
            use_safetensors=True,  # the other kind of weights is a pickle
            ignore_mismatched_sizes=True,  # looked at below
            output_loading_info=True,
            **options,
        )
    except EvalError:
        raise
    except Exception as error:  # what a broken folder makes transformers raise is of every kind
        if "trust_remote_code" in str(error):
            problem = "brings its own modeling code; read it, then run it with --trust_remote_code"
        elif why is not None and isinstance(error, OSError):
            problem = f"no such folder, nor in the Hub's local cache, and {why}"
        else:
            problem = f"cannot be opened ({type(error).__name__}: {_one_line(error)})"
        raise EvalError(f"--model {args.model!r}: {problem}") from error
    # transformers fills these with random numbers and goes on
    unfilled = sorted({*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])})
    if unfilled:
        raise EvalError(
            f"--model {args.model!r}: config.json asks for {len(unfilled)} tensors that the weights lack or "
            f"have in another shape ({unfilled[0]}, ...); use the config.json that was saved with them"
        )
    return tokenizer, model.to(args.device)


def _revision(model):
    """The commit of a model from the Hub, whose name alone does not fix the weights; None for a folder."""
    from huggingface_hub import try_to_load_from_cache

    config = None if Path(model).is_dir() else try_to_load_from_cache(model, "config.json")
    return Path(config).parent.name if isinstance(config, str) else None  # snapshots/COMMIT/config.json


def _run_hellaswag(args, items, tokenizer, model, metric):
    """
    Returns:
        dict: the metric's results, seconds, the number of sequences cut to the model's context.
    """
    from tqdm import tqdm

    num_cut = 0

    def on_batch(scores):
        nonlocal num_cut
        num_cut += sum(score.num_cut > 0 for score in scores)
        bar.update(len(scores))

    start = time.perf_counter()
    # disable=None: no bar where the output is no terminal
    with tqdm(total=4 * len(items), desc="hellaswag", unit="ending", disable=None, leave=False) as bar:
        predictions = score_hellaswag(model, tokenizer, items, batch_size=args.batch_size, on_batch=on_batch)
    seconds = time.perf_counter() - start
    results = metric.compute(predictions=predictions, references=[item.label for item in items])
    return {**results, "seconds": round(seconds, 3), "num_cut": num_cut}


def _table(args, result, source, published):
    acc, acc_norm = (f"{result[name]:.4f} ± {result[name + '_stderr']:.4f}" for name in ("acc", "acc_norm"))
    rows = [("task", "n", "acc", "acc_norm"), ("hellaswag", f"{result['n']:,}", acc, acc_norm)]
    if published is not None:
        rows.append((published["model"], "", f"{published['acc']:.4f}", f"{published['acc_norm']:.4f}"))
    width = max(len(row[0]) for row in rows)
    lines = [f"{task:{width}}  {n:>6}  {acc:15}  {acc_norm}" for task, n, acc, acc_norm in rows]
    lines += [
        "",
        f"model  {args.model} ({args.dtype}, {args.device})",
        f"items  {source.description}",
        f"time   {result['seconds']:.1f} seconds, {result['n'] / max(result['seconds'], 1e-3):.1f} items/s",
    ]
    if result["num_cut"]:
        lines.append(
            f"note   {result['num_cut']} of {4 * result['n']} sequences were longer than the model's context "
            "and lost their beginning"
        )
    return "\n".join(lines)


def _write_json(path, content):
    """Written aside and renamed, so that `path` is never half a file."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise EvalError(f"--output {str(path)!r} cannot be written ({error})") from error


def _one_line(error):
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def _main(arguments):
    args = _parse_arguments(arguments)
    if args.device is None:
        has_mps = torch.backends.mps.is_available()
        args.device = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    _check_arguments(args)

    items, source = load_items(args.data, args.limit)
    tokenizer, model = _load_model(args)

    import evaluate
    import transformers

    # In memory: the default is a file in a cache that two runs at once would fight for.
    metric = evaluate.load(str(Path(__file__).parent / "hellaswag"), keep_in_memory=True)
    if source.is_sample:
        print(f"warning: {source.description}", file=sys.stderr)
    result = _run_hellaswag(args, items, tokenizer, model, metric)

    is_full_set = not source.is_sample and result["n"] == NUM_VALIDATION_ITEMS
    published = PUBLISHED if is_full_set else None
    print(_table(args, result, source, published))
    if args.output is not None:
        seconds = result.pop("seconds")
        num_cut = result.pop("num_cut")
        content = {
            "model": args.model,
            "revision": _revision(args.model),
            "task": "hellaswag",
            # JSON has no nan, which is what the standard error of one item is
            "results": {name: None if math.isnan(value) else value for name, value in result.items()},
            "published": published,
            "data": {"source": source.description, "is_sample": source.is_sample, "sha256": source.sha256},
            "sequences_cut_to_context": num_cut,
            "seconds": seconds,
            "dtype": args.dtype,
            "device": args.device,
            "batch_size": args.batch_size,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        _write_json(args.output, content)


def main(arguments=None):
    """
    Returns:
        exit code: 0, or 2 for what the user can mend, said on one line of stderr.
    """
    try:
        _main(arguments)
    except EvalError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"error: out of memory, use a smaller --batch_size ({_one_line(error)})", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # the libraries' chatter; what matters of it is checked and said here
    sys.exit(main())
