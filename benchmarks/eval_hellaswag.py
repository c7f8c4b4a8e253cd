"""
Times HellaSwag: ours beside lm-evaluation-harness's own backend and beside the lecture's loop, on the same model.

    python benchmarks/eval_hellaswag.py --data hellaswag_val.jsonl.xz          # 124M, float32, 60 items
    python benchmarks/eval_hellaswag.py --data ... --lecture build-nanogpt/hellaswag.py            # and the lecture
    python benchmarks/eval_hellaswag.py --data ... --dtype bf16 --items 10042

All score the same random weights in one process and take turns, `--rounds` times. Each is timed from texts to figures,
tokenising included, loading not. "ours, one prompt" does what its neighbour does: lm-eval's prompt, or the lecture's;
"ours, both" gives all figures of `python -m eval`. The figures must be equal, or the program says which are not; in
bf16 some may differ by rounding.

The lecture's script is read, not run: its functions are taken, with a tokenizer and items that need no network.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import platform
import random
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from train_step import cpu_name, definitions_of, synchronize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `data` and `eval` are not installed

from data.tokenizer import load_hf_tokenizer, load_tiktoken
from eval import evaluate
from eval.hellaswag.items import load_items
from eval.hellaswag.task import LECTURE, LM_EVAL, Task
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.configuration_gpt2repro import SIZES


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="HellaSwag's items, a .jsonl (.gz, .xz) file")
    parser.add_argument("--items", type=int, default=60, help="how many of them, drawn at random")
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights")
    parser.add_argument("--lecture", help="build-nanogpt's hellaswag.py")
    parser.add_argument("--lm_eval_batch_size", type=int, nargs="*", default=[1, 16], help="each is a candidate")
    parser.add_argument("--tokens_per_batch", type=int, help="ours; by default what the evaluation takes")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = GPT2ReproForCausalLM(GPT2ReproConfig.from_size(args.size))
    model.to(device, torch.bfloat16 if args.dtype == "bf16" else torch.float32).eval()
    tokenizer = load_hf_tokenizer()
    every, _ = load_items(args.data)
    items = random.Random(0).sample(every, min(args.items, len(every)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "items.jsonl"  # ours reads them from a file, in its own time
        path.write_text("".join(json.dumps(dataclasses.asdict(item)) + "\n" for item in items))
        compare(args, model, device, tokenizer, items, path)


def compare(args, model, device, tokenizer, items, path):
    candidates = {}
    if args.lecture:
        candidates["the lecture's loop"] = lambda: score_as_the_lecture(args.lecture, model, device, items)
        candidates["ours, the lecture's prompt"] = lambda: score_ours(args, model, tokenizer, path, (LECTURE,))
    for size in args.lm_eval_batch_size:
        candidates[f"lm-eval, batches of {size}"] = lambda size=size: score_as_lm_eval(model, tokenizer, items, size)
    candidates["ours, lm-eval's prompt"] = lambda: score_ours(args, model, tokenizer, path, (LM_EVAL,))
    candidates["ours, both"] = lambda: score_ours(args, model, tokenizer, path, (LECTURE, LM_EVAL))

    seconds, figures = {name: [] for name in candidates}, {}
    for number in range(args.rounds):
        for name, run in candidates.items():
            synchronize(device)
            start = time.perf_counter()
            figures[name] = run()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
            print(f"round {number + 1}  {name:28} {len(items) / seconds[name][-1]:8.2f} items/s", flush=True)
    print(report(args, device, len(items), seconds, figures))


def score_ours(args, model, tokenizer, path, prompts):
    task = Task(data=str(path), prompts=prompts)
    [results] = evaluate(model, tokenizer, [task], tokens_per_batch=args.tokens_per_batch)["results"].values()
    return {figure: results[figure] for figure in task.metrics if figure in results}


def score_as_lm_eval(model, tokenizer, items, batch_size):
    """What lm-eval does with the requests of its task hellaswag, and its task's arithmetic."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    backend = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=(item.lm_eval_query, f" {ending}"), idx=0)
        for item in items
        for ending in item.lm_eval_endings
    ]
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        sums = [value for value, _ in backend.loglikelihood(requests)]
    right = {"lm_eval_acc": 0, "lm_eval_acc_norm": 0}
    for number, item in enumerate(items):
        of_item = sums[4 * number : 4 * number + 4]
        norms = [value / len(ending) for value, ending in zip(of_item, item.lm_eval_endings, strict=True)]
        right["lm_eval_acc"] += of_item.index(max(of_item)) == item.label
        right["lm_eval_acc_norm"] += norms.index(max(norms)) == item.label
    return {figure: count / len(items) for figure, count in right.items()}


def score_as_the_lecture(path, model, device, items):
    """The script's own `evaluate`, on our model and items."""
    names = definitions_of(path)
    names["enc"] = load_tiktoken()
    names["GPT2LMHeadModel"] = type("Loaded", (), {"from_pretrained": staticmethod(lambda _: model)})
    names["iterate_examples"] = lambda _: iter(
        [{"ctx": item.ctx, "endings": item.endings, "label": item.label} for item in items]
    )
    with contextlib.redirect_stdout(io.StringIO()) as output:
        names["evaluate"]("gpt2", device)
    [*_, right] = re.findall(r"acc_norm: (\d+)/", output.getvalue())
    return {"acc_norm": int(right) / len(items)}


def report(args, device, num_items, seconds, figures):
    """A Markdown table: medians over the rounds, ratios within a round."""
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
    lm_eval = [name for name in seconds if name.startswith("lm-eval")]
    best = min(lm_eval, key=lambda name: statistics.median(seconds[name]), default=None)
    lines = [
        "",
        f"{args.size}, {args.dtype}, {num_items} items; {hardware}, torch {torch.__version__}, "
        f"Python {platform.python_version()}; median of {args.rounds} rounds (lowest to highest)",
        "",
        "| candidate | items/s | over lm-eval's best | over the lecture's loop | figures |",
        "|---|---|---|---|---|",
    ]
    for name, turns in seconds.items():
        rates = [num_items / turn for turn in turns]
        row = [name, f"{statistics.median(rates):.2f} ({min(rates):.2f} to {max(rates):.2f})"]
        for other in (best, "the lecture's loop"):
            ratios = [theirs / ours for theirs, ours in zip(seconds.get(other, []), turns, strict=False)]
            row.append(f"{statistics.median(ratios):.2f}" if ratios else "-")
        row.append(", ".join(f"{figure} {value:.4f}" for figure, value in figures[name].items()))
        lines.append("| " + " | ".join(row) + " |")
    ours = figures["ours, both"]
    different = [
        f"{name}: {figure} {value:.4f}, ours {ours[figure]:.4f}"
        for name, of_name in figures.items()
        for figure, value in of_name.items()
        if value != ours[figure]
    ]
    return "\n".join([*lines, "", *(different or ["All figures are equal."])])


if __name__ == "__main__":
    main()
