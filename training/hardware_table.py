"""Estimate time and cost of a run on the cards of training/cards.py. None of them need be here.

    python -m training.hardware_table    the table of docs/hardware.md

`train.py --dry_run --card h100` prints the same numbers for any recipe.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from modeling_gpt2repro import GPT2ReproConfig
from training.batch import RESERVED_SHARE, micro_batch_sizes
from training.cards import CARDS, PRICES_DATE, Card
from training.config import BatchConfig
from training.estimate import Plan, card_hardware, format_duration

# Bytes that a compiled step moves outside matmuls and attention, counted by Inductor for 64 x 1024 tokens in bfloat16
# on a GPU that computes nothing (benchmarks/RECORDS.md).
_BLOCK_BYTES = 143  # per token, block and element of the width
_LOGIT_BYTES = 5.2  # per token and entry of the vocabulary
_MICRO_BATCH_BYTES = 12  # per parameter: adding up gradients
_STEP_BYTES = 52  # per parameter: clipping, AdamW, zeroing

SIZES = ("124M", "350M", "774M", "1558M")
# Sizes that `--batch.micro_batch_size auto` found on a GPU that computes nothing, which has the card's memory and
# torch's allocator (not compiled): {(card, model): sequences}, negative with activation checkpointing.
COUNTED: dict[tuple[str, str], int] = {}


class CardEstimate(NamedTuple):
    """What a run takes on one card."""

    card: Card
    micro_batch_size: int
    """0: not even one sequence fits"""
    activation_checkpointing: bool
    tokens_per_s: float
    hours: float
    dollars: float | None

    def describe(self) -> str:
        """Return the console's line."""
        name = f"on        {self.card.name:<10}"
        if not self.micro_batch_size:
            return f"{name} does not fit, with activation checkpointing either"
        checkpointing = " with activation checkpointing" if self.activation_checkpointing else ""
        price = "" if self.dollars is None else f", ${self.dollars:,.2f} at ${self.card.dollars_per_hour:.2f} per hour"
        return (
            f"{name} {self.micro_batch_size} sequence(s) at once{checkpointing}, {self.tokens_per_s:,.0f} tokens/s, "
            f"{format_duration(3600 * self.hours)}{price}"
        )


def estimate_on_card(plan: Plan, card: Card) -> CardEstimate:
    """Estimate a plan on one card: the largest micro-batch that fits, with activation checkpointing if none does."""
    hardware = card_hardware(card)
    plan = dataclasses.replace(plan, hardware=hardware, compiled=True)
    usable = card.gigabytes * 1e9 * (1 - RESERVED_SHARE)
    sizes, size = micro_batch_sizes(plan.batch, 1), 0
    if plan.batch.micro_batch_size != "auto":
        sizes = [n for n in sizes if n <= plan.batch.micro_batch_size]
    for checkpointing in (plan.activation_checkpointing, True):
        plan = dataclasses.replace(plan, activation_checkpointing=checkpointing)
        size = max((n for n in sizes if plan.estimate_memory(n).total <= usable), default=0)
        if size:
            break
    rate = tokens_per_s(plan, card, size or 1)
    hours = plan.total_tokens / rate / 3600
    price = card.dollars_per_hour
    return CardEstimate(card, size, checkpointing, rate, hours, None if price is None else hours * price)


def tokens_per_s(plan: Plan, card: Card, micro_batch_size: int) -> float:
    """Estimate the rate of compiled training steps: counted FLOPs and bytes over a share of the data sheet's rates.

    Muon's own work (1% of a step of 524,288 tokens), evaluation and small micro-batches, which keep a large card less
    busy, are not in it.
    """
    shape, reached, seq_len = plan.shape, card.reached, plan.batch.seq_len
    positions = shape.n_positions * shape.n_embd
    block_parameters = plan.num_parameters - positions - shape.vocab_size * shape.n_embd
    peak, again = card.tflops * 1e12, int(plan.activation_checkpointing)
    matmul = (6 * (plan.num_parameters - positions) + 2 * again * block_parameters) / (peak * reached.matmul)
    # The causal half of attention's two (forward) and five (backward) matmuls.
    attention_flops = shape.n_layer * shape.n_embd * seq_len
    attention = 2 * (1 + again) * attention_flops / (peak * reached.attention_forward)
    attention += 5 * attention_flops / (peak * reached.attention_backward)
    num_bytes = _BLOCK_BYTES * (1 + again / 3) * shape.n_layer * shape.n_embd + _LOGIT_BYTES * shape.vocab_size
    num_bytes += _MICRO_BATCH_BYTES * plan.num_parameters / (micro_batch_size * seq_len)
    num_bytes += _STEP_BYTES * plan.num_parameters / plan.batch.tokens_per_step
    return 1 / (matmul + attention + num_bytes / (card.gb_per_s * 1e9 * reached.bandwidth))


def describe_cards(plan: Plan, card: str | None) -> str:
    """Return the console's lines about one card, or about the usual ones of clouds."""
    lines = [estimate_on_card(plan, CARDS[name]).describe() for name in ([card] if card else ("a100", "h100", "h200"))]
    basis = f"estimated for one card, compiled, at list prices of {PRICES_DATE}; docs/hardware.md has the basis"
    return "\n".join([*lines, f"          ({basis})"])


def table(cards: Sequence[str] = tuple(CARDS)) -> str:
    """Return docs/hardware.md's table, in Markdown."""
    head = ["card", "memory", *SIZES, "tokens/s, 124M", "10B tokens", "fast recipe, 5.5B"]
    rows = [head, ["---"] * len(head)]
    for key in cards:
        card, by_size = CARDS[key], {size: estimate_on_card(recipe_plan(size, 19_073), CARDS[key]) for size in SIZES}
        lecture, fast = by_size["124M"], estimate_on_card(recipe_plan("124M", 10_490), card)
        fits = [_format_fit(key, size, estimate) for size, estimate in by_size.items()]
        runs = [_format_run(lecture), _format_run(fast)]
        precision = "" if card.mixed_precision == "bf16" else f" ({card.mixed_precision})"
        rows.append(
            [f"{card.name}{precision}", f"{card.gigabytes:.0f} GB", *fits, f"{lecture.tokens_per_s:,.0f}", *runs]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def recipe_plan(size: str, max_steps: int) -> Plan:
    """Return the plan of a recipe: GPT-2 of a size, its batch, and so many steps."""
    batch = BatchConfig(tokens_per_step=2**20 if size == "1558M" else 2**19, seq_len=1024, micro_batch_size="auto")
    return Plan(
        shape=GPT2ReproConfig.from_size(size),
        batch=batch,
        max_steps=max_steps,
        hardware=card_hardware(CARDS["h100"]),
        compiled=True,
    )


def _format_fit(key: str, size: str, estimate: CardEstimate) -> str:
    counted = COUNTED.get((key, size))
    number = estimate.micro_batch_size if counted is None else abs(counted)
    checkpointing = estimate.activation_checkpointing if counted is None else counted < 0
    if not number:
        return "no"
    return f"{'~' if counted is None else ''}{number}{' ck' if checkpointing else ''}"


def _format_run(estimate: CardEstimate) -> str:
    hours = f"{estimate.hours:,.1f} h"
    return hours if estimate.dollars is None else f"{hours}, ${estimate.dollars:,.0f}"


if __name__ == "__main__":
    print(table())
