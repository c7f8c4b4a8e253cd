"""Well-known corpora on the Hub: `python -m data.prepare NAME` is short for `hub --dataset ...` with these settings.

Sizes and licenses are those of the data sets' cards in November 2026.
"""

from typing import NamedTuple


class Corpus(NamedTuple):
    """A data set on the Hub, with a column "text"."""

    dataset: str
    subset: str | None
    max_tokens: int | None
    """default of --max_tokens; None where the subset itself is a sample of 10 billion tokens"""
    license: str
    about: str


CORPORA = {
    "fineweb-edu": Corpus(
        "HuggingFaceFW/fineweb-edu", "sample-10BT", None, "ODC-By 1.0", "1.3T tokens of educational web text"
    ),
    "fineweb": Corpus("HuggingFaceFW/fineweb", "sample-10BT", None, "ODC-By 1.0", "15T tokens of web text"),
    "climbmix": Corpus(
        "karpathy/climbmix-400b-shuffle", None, 10**10, "CC BY-NC 4.0", "NVIDIA's ClimbMix, 400B tokens, shuffled"
    ),
    "dclm-edu": Corpus(
        "HuggingFaceTB/dclm-edu", None, 10**10, "CC BY 4.0", "DCLM's web text with an educational score above 2"
    ),
}
