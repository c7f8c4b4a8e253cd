"""Estimates for cards that are not here, and the table of docs/hardware.md."""

import dataclasses
import re
import typing

import pytest
from tiny_run import ROOT

from training import TrainingError
from training.cards import CARDS
from training.config import Config, load_config
from training.estimate import card_hardware
from training.hardware_table import (
    COUNTED,
    SIZES,
    _largest_size,
    describe_cards,
    estimate_on_card,
    large_model_table,
    main_table,
    recipe_plan,
)
from training.settings import settings_of


@pytest.mark.parametrize("table", [main_table, large_model_table])
def test_docs_have_the_tables(table):
    assert table() in (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8"), (
        "write the output of `python -m training.hardware_table` into docs/hardware.md"
    )


def test_readme_has_rows_of_the_table():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = lines.index(main_table().splitlines()[0])
    rows = [line for line in lines[start : start + 6] if line.startswith("|")]
    assert len(rows) == 6 and set(rows) < set(main_table().splitlines())


def test_dry_run_prints_the_tables_numbers():
    """For the recipe behind a row."""
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in main_table().splitlines()[2:]]
    for key, row in zip(CARDS, rows, strict=True):
        name, size, rate, run = row[0], row[2], row[6], row[7]
        line = describe_cards(recipe_plan("124M", 19_073), key)
        basis = "estimated" if "~" in size else "counted"
        assert CARDS[key].name in name and f" {size.strip('~')} sequence(s) at once ({basis}), {rate} " in line, line
        days = re.search(r"(?:(\d+) days?, )?(\d+):(\d\d):\d\d", line)
        assert 24 * int(days[1] or 0) + int(days[2]) + int(days[3]) / 60 == pytest.approx(
            float(run.split(" h")[0]), abs=0.1
        )


def test_estimates_are_in_the_order_of_the_cards():
    rates = {key: estimate_on_card(recipe_plan("124M", 10), key).tokens_per_s for key in CARDS}
    order = ("t4", "rtx3090", "rtx4090", "a100", "h100", "h200", "b200")
    assert sorted(order, key=rates.get) == list(order)
    assert rates["h100"] == pytest.approx(463_000, rel=0.25)  # llm.c's, published
    assert rates["a100"] == pytest.approx(221_000, rel=0.25)


def test_activation_checkpointing_is_slower_and_fits_more():
    plan = recipe_plan("1558M", 10)
    plain, again = (
        estimate_on_card(dataclasses.replace(plan, activation_checkpointing=choice), "h100") for choice in (False, True)
    )
    assert again.micro_batch_size > 2 * plain.micro_batch_size
    assert 0.65 < again.tokens_per_s / plain.tokens_per_s < 0.85


def test_memory_estimate_agrees_with_what_was_counted():
    """Up to a factor of two, the step between sizes; not compiled, as they were counted."""
    for key, sizes in COUNTED.items():
        for size, counted in zip(SIZES, sizes, strict=True):
            plan = dataclasses.replace(recipe_plan(size, 10), hardware=card_hardware(CARDS[key]), compiled=False)
            estimate, is_checkpointed = _largest_size(plan)
            if counted and not (counted == 1 and is_checkpointed):  # the smallest size is at the margin
                assert not is_checkpointed and counted / 2 <= estimate <= 2 * counted, (key, size, estimate)
            elif not counted:
                assert is_checkpointed, (key, size, estimate)
    assert {size: recipe_plan(size, 1).num_parameters for size in SIZES} == SIZES


def test_card_of_the_settings():
    names, none = typing.get_args(settings_of(Config)["card"].type_hint)
    assert {*typing.get_args(names)} == {*CARDS} and none is type(None)
    for arguments, words in (
        (["--dry_run", "--card", "h1000"], "card must be rtx3060, .* t4, .*h100, .* or mi300x or null, got h1000"),
        (["--card", "h100"], "add --dry_run"),
    ):
        with pytest.raises(TrainingError, match=words):
            load_config(arguments)
