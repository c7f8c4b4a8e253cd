"""Estimate time and cost of a run on the cards of training/cards.py. None of them need be here.

    python -m training.hardware_table    the tables of docs/hardware.md

`train.py --dry_run --card h100` prints the same numbers for any recipe.
"""

import dataclasses
from typing import NamedTuple

from common import markdown
from modeling_gpt2repro import GPT2ReproConfig
from training.batch import RESERVED_SHARE, device_memory, fitting_sizes, micro_batch_sizes
from training.cards import CARDS, PRICES_DATE, Card
from training.config import BatchConfig
from training.estimate import Plan, card_hardware, format_duration

# Bytes that a compiled step moves outside matmuls and attention, counted by Inductor for 64 x 1024 tokens in bfloat16
# with a stand-in for the CUDA driver, which computes nothing (benchmarks/RECORDS.md).
_BLOCK_BYTES = 143  # per token, block and element of the width
_LOGIT_BYTES = 5.2  # per token and entry of the vocabulary
_MICRO_BATCH_BYTES = 12  # per parameter: adding up gradients
_STEP_BYTES = 52  # per parameter: clipping, AdamW, zeroing
_SHORT_STEP = 0.01  # seconds

SIZES = {"124M": 124_439_808, "350M": 354_823_168, "774M": 774_030_080, "1558M": 1_557_611_200}
# Sequences of 1,024 tokens that `--batch.micro_batch_size auto` found for each of SIZES with that stand-in, which has
# the card's memory and torch's allocator; not compiled. 0: none, not even with activation checkpointing.
COUNTED = {
    "t4": (16, 4, 0, 0),
    "rtx3060": (4, 2, 0, 0),
    "rtx3090": (32, 8, 4, 0),
    "rtx4090": (32, 8, 4, 0),
    "rtx5090": (64, 16, 4, 1),
    "a10g": (32, 8, 2, 0),
    "l4": (32, 8, 2, 0),
    "a100_40": (64, 32, 8, 2),
    "a100": (128, 64, 32, 16),
    "h100": (128, 64, 32, 16),
    "h200": (256, 128, 64, 32),
    "b200": (512, 128, 64, 64),
}


class CardEstimate(NamedTuple):
    """Time and cost of a run on one card."""

    card: Card
    micro_batch_size: int
    """0: not even one sequence fits"""
    activation_checkpointing: bool
    is_counted: bool
    """True if micro_batch_size is from COUNTED, False if it is by the memory estimate"""
    tokens_per_s: float
    hours: float
    dollars: float | None

    def describe(self) -> str:
        """Return the console's line."""
        name = f"on        {self.card.name:<10}"
        if not self.micro_batch_size:
            return f"{name} does not fit, not even with activation checkpointing"
        checkpointing = " with activation checkpointing" if self.activation_checkpointing else ""
        price = "" if self.dollars is None else f", ${self.dollars:,.2f} at ${self.card.dollars_per_hour:.2f} per hour"
        basis = "counted" if self.is_counted else "estimated"
        return (
            f"{name} {self.micro_batch_size} sequence(s) at once{checkpointing} ({basis}), {self.tokens_per_s:,.0f} "
            f"tokens/s (estimated), {format_duration(3600 * self.hours)}{price}"
        )


def estimate_on_card(plan: Plan, key: str) -> CardEstimate:
    """Estimate a plan on one card: the largest micro-batch that fits, with activation checkpointing if none does."""
    card = CARDS[key]
    is_own_price = plan.hardware.card is card  # the plan is for this card, with --dollars_per_hour if that was given
    price = plan.hardware.dollars_per_hour if is_own_price else card.dollars_per_hour
    plan = dataclasses.replace(plan, hardware=card_hardware(card), compiled=True)
    size, checkpointing = _largest_size(plan)
    counted = dict(zip(SIZES.values(), COUNTED.get(key, ()), strict=False)).get(plan.num_parameters)
    is_counted = counted is not None and not plan.activation_checkpointing and plan.batch.micro_batch_size == "auto"
    is_counted = is_counted and plan.batch.seq_len == 1024 and counted in micro_batch_sizes(plan.batch, 1)
    if counted is not None and is_counted:
        size, checkpointing = counted, counted == 0
    plan = dataclasses.replace(plan, activation_checkpointing=checkpointing)
    rate = tokens_per_s(plan, card, size or 1)
    hours = plan.total_tokens / rate / 3600
    return CardEstimate(card, size, checkpointing, is_counted, rate, hours, None if price is None else hours * price)


def _largest_size(plan: Plan) -> tuple[int, bool]:
    """Return (sequences that fit by the memory estimate, True with activation checkpointing), or (0, True)."""
    usable = device_memory(plan.hardware)[0] * (1 - RESERVED_SHARE)
    sizes = micro_batch_sizes(plan.batch, 1)
    if plan.batch.micro_batch_size != "auto":
        sizes = [n for n in sizes if n <= plan.batch.micro_batch_size]
    for checkpointing in (plan.activation_checkpointing, True):
        choice = dataclasses.replace(plan, activation_checkpointing=checkpointing)
        if fitting := fitting_sizes(choice, sizes, usable):
            return fitting[-1], checkpointing
    return 0, True


def tokens_per_s(plan: Plan, card: Card, micro_batch_size: int) -> float:
    """Estimate the rate of compiled training steps: counted FLOPs and bytes over a share of the data sheet's rates.

    Muon's own work (1.5% of a step of 524,288 tokens), evaluation and small micro-batches, which keep a large card less
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
    estimates = [estimate_on_card(plan, key) for key in ([card] if card else ("a100", "h100", "h200"))]
    lines = [estimate.describe() for estimate in estimates]
    if any(plan.batch.tokens_per_step < _SHORT_STEP * estimate.tokens_per_s for estimate in estimates):
        lines.append("          steps this short wait for the start of their kernels: expect longer times")
    basis = f"estimated for one card, compiled, at list prices of {PRICES_DATE}; docs/hardware.md has the basis"
    return "\n".join([*lines, f"          ({basis})"])


def main_table() -> str:
    """Return docs/hardware.md's first table: what fits, and time and cost of the 124M recipes."""
    head = ["card", "GB", *SIZES, "tokens/s", "10B tokens", "fast recipe"]
    rows = []
    for key, card in CARDS.items():
        lecture, fast = (estimate_on_card(recipe_plan("124M", steps), key) for steps in (19_073, 10_490))
        fits = [_format_fit(estimate_on_card(recipe_plan(size, 1), key)) for size in SIZES]
        name = card.name if card.mixed_precision == "bf16" else f"{card.name} ({card.mixed_precision})"
        rate = f"{lecture.tokens_per_s:,.0f}"
        rows.append([name, f"{card.gigabytes:.0f}", *fits, rate, _format_run(lecture), _format_run(fast)])
    return markdown.table(head, rows)


def large_model_table() -> str:
    """Return docs/hardware.md's second table: GPT-2 1558M without and with activation checkpointing."""
    head = [
        "card",
        *(f"{kind}: {what}" for kind in ("none", "block") for what in ("sequences", "tokens/s", "33.6B tokens")),
    ]
    rows, plan = [], recipe_plan("1558M", 32_000)
    for key, card in CARDS.items():
        row = [card.name]
        for checkpointing in (False, True):
            estimate = estimate_on_card(dataclasses.replace(plan, activation_checkpointing=checkpointing), key)
            fits = estimate.micro_batch_size > 0 and estimate.activation_checkpointing == checkpointing
            cells = [_format_fit(estimate), f"{estimate.tokens_per_s:,.0f}", _format_run(estimate)]
            row += cells if fits else ["no", "", ""]
        if row[4] != "no":
            rows.append(row)
    return markdown.table(head, rows)


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


def _format_fit(estimate: CardEstimate) -> str:
    if not estimate.micro_batch_size:
        return "no"
    return f"{'' if estimate.is_counted else '~'}{estimate.micro_batch_size}"


def _format_run(estimate: CardEstimate) -> str:
    hours = f"{estimate.hours:,.1f} h"
    return hours if estimate.dollars is None else f"{hours}, ${estimate.dollars:,.0f}"


if __name__ == "__main__":
    print(main_table(), large_model_table(), sep="\n\n")
