"""Data sheets, memory and prices of the cards that people have."""

import re
from typing import NamedTuple

PRICES_DATE = "late 2026"


class Reached(NamedTuple):
    """Shares of a data sheet's rates that a training step reaches."""

    matmul: float
    """of the peak, by bfloat16 matmuls of a step's shapes"""
    bandwidth: float
    attention_forward: float
    """of the peak, by the fused attention kernel"""
    attention_backward: float


# Hopper's are measured on an H100: 124M, compiled, cuDNN's attention (benchmarks/RECORDS.md). The others are assumed:
# attention in the range that FlashAttention 2 published (arXiv 2307.08691). GeForce cards come close to a peak that is
# halved for float32 sums. A T4 and an L4 are held at 70 W; a T4 has no flash kernel.
_HOPPER = Reached(0.70, 0.73, 0.31, 0.21)
_AMPERE = Reached(0.80, 0.85, 0.54, 0.38)
_GEFORCE = Reached(0.85, 0.90, 0.85, 0.67)
_SMALL = Reached(0.45, 0.85, 0.40, 0.30)
_TURING = Reached(0.40, 0.80, 0.30, 0.20)


class Card(NamedTuple):
    """A card."""

    name: str
    tflops: float
    """dense bfloat16 matmul with float32 sums of the data sheet, 10^12 FLOP/s (float16 on cards without bfloat16)"""
    gb_per_s: float
    """bandwidth of its memory"""
    gigabytes: float
    """memory as torch reports it, 10^9 bytes"""
    dollars_per_hour: float | None
    """on-demand list price of large GPU clouds, rounded; None: they do not rent it out"""
    reached: Reached
    words: str = ""
    """regular expression that torch's name of the device matches; empty: the card's name"""
    mixed_precision: str = "bf16"


# By the names that --card takes, which training/config.py lists, too. The first card whose words fit is a device's.
# Data sheets: nvidia.com, amd.com.
CARDS = {
    "t4": Card("T4", 65, 320, 15.6, 0.35, _TURING, mixed_precision="fp16"),
    "rtx3060": Card("RTX 3060", 25.5, 360, 12.5, None, _GEFORCE),
    "rtx3090": Card("RTX 3090", 71, 936, 25.3, 0.25, _GEFORCE),
    "rtx4090": Card("RTX 4090", 165, 1008, 25.2, 0.40, _GEFORCE),
    "rtx5090": Card("RTX 5090", 209, 1792, 33.7, 0.70, _GEFORCE),
    "a10g": Card("A10G", 70, 600, 23.7, 0.75, _GEFORCE),
    "l4": Card("L4", 121, 300, 23.7, 0.70, _SMALL),
    "l40s": Card("L40S", 362, 864, 47.7, 1.00, _HOPPER),
    "a100_40": Card("A100 40GB", 312, 1555, 42.3, 1.30, _AMPERE, words=r"\bA100\b.*\b40GB"),
    "a100": Card("A100", 312, 2039, 85.0, 1.80, _AMPERE),
    "h100_pcie": Card("H100 PCIe", 756, 2000, 84.9, 2.50, _HOPPER),
    "h100": Card("H100", 989, 3350, 84.9, 3.00, _HOPPER),
    "h200": Card("H200", 989, 4800, 150.1, 3.50, _HOPPER),
    "b200": Card("B200", 2250, 7700, 191.6, 5.00, _HOPPER),
    "mi300x": Card("MI300X", 1307, 5300, 205.8, 2.50, _HOPPER),
}


def card_of_device(name: str) -> Card | None:
    """Return the card of torch's name, such as "NVIDIA H200"; None if unknown, or a part or slower kind of a card."""
    if re.search(r"MIG|Laptop|Max-Q|NVL|GH200|\bTi\b|SUPER| D$", name):
        return None
    return next((card for card in CARDS.values() if re.search(card.words or rf"\b{card.name}\b", name)), None)
