"""Text data sets by name: `python -m data.prepare NAME` is `hub` with the defaults of its row."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A data set on the Hub, as its card describes it."""

    dataset: str
    """Hub id"""
    subset: str | None = None
    """default subset; None for all"""
    max_tokens: int | None = None
    """default of --max_tokens; None where the subset is a sample itself"""
    license: str
    size: str
    """of the default subset, as published"""


CORPORA = {
    "fineweb": Corpus(
        dataset="HuggingFaceFW/fineweb",
        subset="sample-10BT",
        license="ODC-By 1.0",
        size="10 billion GPT-2 tokens, 27.6 GB",
    ),
    "fineweb-edu": Corpus(
        dataset="HuggingFaceFW/fineweb-edu",
        subset="sample-10BT",
        license="ODC-By 1.0",
        size="10 billion GPT-2 tokens",
    ),
    # NVIDIA's own nvidia/ClimbMix has GPT-2 tokens; this copy has the text, shuffled, in 6,543 files (nanochat's data).
    "climbmix": Corpus(
        dataset="karpathy/climbmix-400b-shuffle",
        max_tokens=10**10,
        license="CC BY-NC 4.0 (NVIDIA's ClimbMix)",
        size="400 billion tokens",
    ),
    # Pages that FineWeb-Edu's classifier gives more than 2 of 5 points; its card states no size.
    "dclm-edu": Corpus(
        dataset="HuggingFaceTB/dclm-edu",
        max_tokens=10**10,
        license="CC BY 4.0",
        size="size not stated",
    ),
}
