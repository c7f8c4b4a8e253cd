"""Score some items of CORE's tasks on one model with ours and with nanochat's core_eval.py, and compare.

    python -m benchmarks.eval_core --data BUNDLE --nanochat nanochat/core_eval.py                # 124M, random weights
    python -m benchmarks.eval_core --data BUNDLE --nanochat ... --model CHECKPOINT --items 200 --rounds 1

Both decide the same items, from texts to decisions, and take turns. For each task: the decisions that differ, items per
second, the ratio of the times within a round, and the ratio of the FLOPs that torch counts, which is what sharing
saves. The scored items are the first of each task, in nanochat's order.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks import harness
from common.models import load_model, load_tokenizer
from data.tokenizer import GPT2
from eval.core.bundle import CoreTask, read_bundle
from eval.core.task import Task, make_items
from eval.task import score_items
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.configuration_gpt2repro import SIZES

COLUMNS = ("task", "items", "different", "nanochat, items/s", "ours, items/s", "time ratio", "FLOP ratio")
Records = list[dict[str, Any]]
_KINDS = {"choices": "multiple_choice", "schema": "schema", "completion": "language_modeling"}


def main() -> None:
    """Parse the arguments, measure and print the table."""
    parser = harness.make_parser(__doc__, rounds=3)
    parser.add_argument("--data", required=True, help="the bundle, see `python -m eval --help`")
    parser.add_argument("--nanochat", required=True, help="path of nanochat's core_eval.py")
    parser.add_argument("--model", help="a checkpoint; default: random weights")
    parser.add_argument("--size", choices=SIZES, default="124M", help="of the random weights")
    parser.add_argument("--items", type=int, default=8, help="per task")
    parser.add_argument("--tasks", nargs="+", help="default: all that are there")
    args = parser.parse_args()

    device = harness.pick_device()
    torch.manual_seed(0)
    if args.model:
        tokenizer, _ = load_tokenizer(args.model)
        model = load_model(args.model, dtype="float32", device=str(device)).eval()
    else:
        tokenizer = GPT2.hf()
        model = GPT2ReproForCausalLM(GPT2ReproConfig.from_size(args.size)).eval().to(device)

    def ours(task: CoreTask, records: Records, indices: range) -> list[bool]:
        items = make_items(task, records, indices, tokenizer, model.config.max_position_embeddings)
        return [result["is_correct"] for result in score_items(Task(), model, items)]

    scorers = {"nanochat": nanochat_scorer(args.nanochat, model, tokenizer), "ours": ours}
    rows = []
    for task, records in read_bundle(args.data):
        if not args.tasks or task.name in args.tasks:
            indices = range(len(records))[: args.items]
            candidates = {name: partial(score, task, records, indices) for name, score in scorers.items()}
            rows.append([task.name, len(indices), *compare(candidates, len(indices), args.rounds, device)])
    harness.print_report(args.model or args.size, args.rounds, COLUMNS, rows)
    different = sum(row[2] for row in rows)
    print(f"\n{different} decisions differ." if different else "\nAll decisions are equal.")


def compare(candidates: Mapping[str, Callable[[], list[bool]]], n: int, rounds: int, device: torch.device) -> list[Any]:
    """Return the columns from "different" on."""
    flops = [harness.count_flops(score) for score in candidates.values()]
    timers = {name: partial(harness.timed, score, device) for name, score in candidates.items()}
    results = harness.take_turns(timers, rounds, lambda result: f"{n / result[1]:8.2f} items/s")
    different = sum(a != b for a, b in zip(*(of_one[0][0] for of_one in results.values()), strict=True))
    seconds = [[time for _, time in of_one] for of_one in results.values()]
    rates = [harness.with_range([n / time for time in of_one], ".2f") for of_one in seconds]
    return [different, *rates, harness.median_ratio(*seconds), f"{flops[0] / flops[1]:.2f}"]


def nanochat_scorer(
    path: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Callable[[CoreTask, Records, range], list[bool]]:
    """Return a function that calls the script's own `evaluate_example` with our model and items."""
    evaluate_example = harness.load_definitions(path)["evaluate_example"]

    class Tokenizer:
        """nanochat's interface to a tokenizer."""

        get_bos_token_id = staticmethod(lambda: tokenizer.bos_token_id)

        def __call__(self, texts: list[str], prepend: int) -> list[list[int]]:
            ids = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
            return [[prepend, *tokens] for tokens in ids]

    class Model:
        """nanochat's interface to a model."""

        max_seq_len = model.config.max_position_embeddings

        def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = model(input_ids, use_cache=False).logits
            return logits

    @torch.no_grad()
    def score(task: CoreTask, records: Records, indices: range) -> list[bool]:
        settings = {
            "task_type": _KINDS[task.kind],
            "num_fewshot": task.shots,
            "continuation_delimiter": task.delimiter,
        }
        return [
            bool(evaluate_example(index, Model(), Tokenizer(), records, model.device, settings)) for index in indices
        ]

    return score


if __name__ == "__main__":
    main()
