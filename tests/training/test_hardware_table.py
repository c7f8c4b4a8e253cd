"""Estimates for cards that are not here, and the table of docs/hardware.md."""

import dataclasses
from pathlib import Path

import pytest

from training import TrainingError
from training.cards import CARDS
from training.config import load_config
from training.hardware_table import COUNTED, SIZES, describe_cards, estimate_on_card, recipe_plan, table
from training.settings import settings_of

ROOT = Path(__file__).parents[2]


def test_docs_have_the_table():
    assert table() in (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8"), (
        "write the output of `python -m training.hardware_table` into docs/hardware.md"
    )


def test_dry_run_prints_the_tables_numbers():
    """For the recipe behind a row."""
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table().splitlines()[2:]]
    for key, row in zip(CARDS, rows, strict=True):
        name, rate, run = row[0], row[6], row[7]
        estimate = estimate_on_card(recipe_plan("124M", 19_073), CARDS[key])
        line = describe_cards(recipe_plan("124M", 19_073), key)
        assert CARDS[key].name in name and f" {rate} tokens/s" in line, line
        assert run.startswith(f"{estimate.hours:,.1f} h")


def test_estimates_are_in_the_order_of_the_cards():
    rates = {key: estimate_on_card(recipe_plan("124M", 10), CARDS[key]).tokens_per_s for key in CARDS}
    order = ("t4", "rtx3090", "rtx4090", "a100", "h100", "h200", "b200")
    assert sorted(order, key=rates.get) == list(order)
    assert rates["h100"] == pytest.approx(463_000, rel=0.25)  # llm.c's, published
    assert rates["a100"] == pytest.approx(221_000, rel=0.25)


def test_activation_checkpointing_is_slower_and_fits_more():
    plan = recipe_plan("1558M", 10)
    plain, again = (
        estimate_on_card(dataclasses.replace(plan, activation_checkpointing=choice), CARDS["h100"])
        for choice in (False, True)
    )
    assert again.micro_batch_size > 2 * plain.micro_batch_size
    assert 0.65 < again.tokens_per_s / plain.tokens_per_s < 0.85


def test_estimate_agrees_with_what_was_counted():
    """Within a factor of two, the step between sizes."""
    for (key, size), counted in COUNTED.items():
        estimate = estimate_on_card(recipe_plan(size, 10), CARDS[key])
        assert estimate.micro_batch_size / 2 <= abs(counted) <= 2 * estimate.micro_batch_size, (key, size)
    assert {size for _, size in COUNTED} == set(SIZES)


def test_card_of_the_settings():
    assert all(f" {name}" in settings_of(type(load_config([])))["card"].description for name in CARDS)
    for arguments, words in (
        (["--dry_run", "--card", "h1000"], "card must be one of t4, .*h100.*, got h1000"),
        (["--card", "h100"], "add --dry_run"),
    ):
        with pytest.raises(TrainingError, match=words):
            load_config(arguments)
