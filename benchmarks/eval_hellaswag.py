"""Time HellaSwag on one model: our evaluation, lm-evaluation-harness's own backend, and the lecture's loop.

    python -m benchmarks.eval_hellaswag --data hellaswag_val.jsonl.xz          # 124M, float32, 60 items
    python -m benchmarks.eval_hellaswag --data ... --lecture build-nanogpt/hellaswag.py            # and the lecture
    python -m benchmarks.eval_hellaswag --data ... --dtype bf16 --items 10042

All candidates score the same random weights in one process and take turns. Each is timed from texts to metrics,
including tokenization and excluding loading. "ours, lm-eval's prompt" and "ours, the lecture's prompt" compute what the
candidate that they are compared with computes; "ours, both" computes every metric of `python -m eval`. Metrics that
differ are listed below the table. In float32 all must be equal; in bf16 rounding can change some.

The lecture's script is not run: its functions are taken, with a tokenizer and items that need no network.
"""

import argparse
import contextlib
import io
import json
import random
import re
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks import harness
from data.tokenizer import GPT2, load_tiktoken
from eval import evaluate
from eval.hellaswag.task import LECTURE, LM_EVAL, HellaSwagItem, Task, load_items
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.configuration_gpt2repro import SIZES

THE_LECTURE = "the lecture's loop"
COLUMNS = ("candidate", "items/s", "over lm-eval's best", f"over {THE_LECTURE}", "GFLOP per item", "metrics")
METRICS = ("acc", "acc_norm", "lm_eval_acc", "lm_eval_acc_norm")
Metrics = dict[str, float]


def main() -> None:
    """Parse the arguments, measure and print the table."""
    parser = harness.make_parser(__doc__, rounds=3)
    parser.add_argument("--data", required=True, help="HellaSwag's items, a .jsonl (.gz, .xz) file")
    parser.add_argument("--items", type=int, default=60, help="number of items, drawn at random")
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="dtype of the weights")
    parser.add_argument("--lecture", help="path of build-nanogpt's hellaswag.py")
    parser.add_argument("--lm_eval_batch_size", type=int, nargs="*", default=[1, 16], help="one candidate for each")
    args = parser.parse_args()

    device = harness.pick_device()
    torch.manual_seed(0)
    model = GPT2ReproForCausalLM(GPT2ReproConfig.from_size(args.size)).eval()
    torch.nn.Module.to(model, device, torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    tokenizer = GPT2.hf()
    all_items, _ = load_items(args.data)
    items = random.Random(0).sample(all_items, min(args.items, len(all_items)))

    def score_with_ours(*prompts: str) -> Metrics:
        task = Task(data=str(path), prompts=prompts)
        [results] = evaluate(model, tokenizer, [task])["results"].values()
        return {name: results[name] for name in METRICS if name in results}

    candidates: dict[str, Callable[[], Metrics]] = {}
    if args.lecture:
        candidates[THE_LECTURE] = partial(score_with_lecture, args.lecture, model, items)
        candidates["ours, the lecture's prompt"] = partial(score_with_ours, LECTURE)
    for size in args.lm_eval_batch_size:
        candidates[f"lm-eval, batches of {size}"] = partial(score_with_lm_eval, model, tokenizer, items, size)
    candidates["ours, lm-eval's prompt"] = partial(score_with_ours, LM_EVAL)
    candidates["ours, both"] = partial(score_with_ours, LECTURE, LM_EVAL)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "items.jsonl"  # read by our evaluation within its timed part
        path.write_text("".join(json.dumps(item._asdict()) + "\n" for item in items))
        flops = {name: harness.count_flops(score) for name, score in candidates.items()}
        turns = harness.take_turns(
            {name: partial(harness.timed, score, device) for name, score in candidates.items()},
            args.rounds,
            lambda turn: f"{len(items) / turn[1]:8.2f} items/s",
        )
    print_table(args, len(items), flops, turns)


def score_with_lm_eval(
    model: GPT2ReproForCausalLM, tokenizer: PreTrainedTokenizerBase, items: list[HellaSwagItem], batch_size: int
) -> Metrics:
    """Score with lm-eval's backend and the arithmetic of its task hellaswag."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    backend = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=(item.lm_eval_query, f" {ending}"), idx=0)
        for item in items
        for ending in item.lm_eval_endings
    ]
    with contextlib.redirect_stderr(io.StringIO()):  # hide the progress bar
        sums = [value for value, _ in backend.loglikelihood(requests)]
    num_correct = {"lm_eval_acc": 0, "lm_eval_acc_norm": 0}
    for number, item in enumerate(items):
        item_sums = sums[4 * number : 4 * number + 4]
        norms = [value / len(ending) for value, ending in zip(item_sums, item.lm_eval_endings, strict=True)]
        num_correct["lm_eval_acc"] += item_sums.index(max(item_sums)) == item.label
        num_correct["lm_eval_acc_norm"] += norms.index(max(norms)) == item.label
    return {name: count / len(items) for name, count in num_correct.items()}


def score_with_lecture(path: str, model: GPT2ReproForCausalLM, items: list[HellaSwagItem]) -> Metrics:
    """Call the script's own `evaluate` with our model and items."""
    names = harness.load_definitions(path)
    names["enc"] = load_tiktoken()
    names["GPT2LMHeadModel"] = type("Loaded", (), {"from_pretrained": staticmethod(lambda _: model)})
    names["iterate_examples"] = lambda _: iter(
        [{"ctx": item.ctx, "endings": item.endings, "label": item.label} for item in items]
    )
    with contextlib.redirect_stdout(io.StringIO()) as output:
        names["evaluate"]("gpt2", model.device)
    [*_, num_correct] = re.findall(r"acc_norm: (\d+)/", output.getvalue())
    return {"acc_norm": int(num_correct) / len(items)}


def print_table(
    args: argparse.Namespace, num_items: int, flops: dict[str, int], turns: dict[str, list[tuple[Metrics, float]]]
) -> None:
    """Print the table, and the metrics that are not equal."""
    rates = {name: [num_items / seconds for _, seconds in of_name] for name, of_name in turns.items()}
    metrics = {name: of_name[-1][0] for name, of_name in turns.items()}
    lm_eval = {name: values for name, values in rates.items() if name.startswith("lm-eval")}
    best = max(lm_eval.values(), key=statistics.median, default=[])
    rows = []
    for name, values in rates.items():
        ratios = (harness.median_ratio(values, reference) for reference in (best, rates.get(THE_LECTURE, [])))
        work = f"{flops[name] / num_items / 1e9:.1f}"
        text = ", ".join(f"{metric} {value:.4f}" for metric, value in metrics[name].items())
        rows.append([name, harness.with_range(values, ".2f"), *ratios, work, text])
    harness.print_report(f"{args.size}, {args.dtype}, {num_items} items", args.rounds, COLUMNS, rows)
    ours = metrics["ours, both"]
    different = [
        f"{name}: {metric} {value:.4f}, ours {ours[metric]:.4f}"
        for name, of_name in metrics.items()
        for metric, value in of_name.items()
        if value != ours[metric]
    ]
    print("", *(different or ["All metrics are equal."]), sep="\n")


if __name__ == "__main__":
    main()
