"""Text data sets by name: `python -m data.prepare NAME` is `hub` with the defaults of its row."""

from typing import NamedTuple


class Corpus(NamedTuple):
    """A data set on the Hub, as its card describes it."""

    dataset: str
    subset: str | None
    """default subset; None for all"""
    max_tokens: int | None
    """default of --max_tokens; None where the subset is a sample itself"""
    license: str
    size: str
    """of the default subset, as published"""


_10B = "10 billion GPT-2 tokens"
CORPORA = {
    "fineweb": Corpus("HuggingFaceFW/fineweb", "sample-10BT", None, "ODC-By 1.0", f"{_10B}, 27.6 GB"),
    "fineweb-edu": Corpus("HuggingFaceFW/fineweb-edu", "sample-10BT", None, "ODC-By 1.0", _10B),
    # NVIDIA's own nvidia/ClimbMix has GPT-2 tokens; this copy has the text, shuffled, in 6,543 files (nanochat's data).
    "climbmix": Corpus(
        "karpathy/climbmix-400b-shuffle", None, 10**10, "CC BY-NC 4.0 (NVIDIA's ClimbMix)", "400 billion tokens"
    ),
    # Pages that FineWeb-Edu's classifier gives more than 2 of 5 points; its card states no size.
    "dclm-edu": Corpus("HuggingFaceTB/dclm-edu", None, 10**10, "CC BY 4.0", "size not stated"),
}
