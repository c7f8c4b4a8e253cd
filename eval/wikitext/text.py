"""WikiText's text: pages and rows from its raw form, and without the spaces of its tokens."""

import io
import itertools
import re
from collections.abc import Sequence

# " = Title = ", and not " = = Section = = ".
_TITLE = re.compile(r"= (?!=)(.*(?<!=))? =")
# Opening and closing marks that WikiText has spaces inside of.
_ENCLOSING = [("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'")]


def split_pages(text: str) -> list[str]:
    """Return the pages of WikiText's raw text: each begins with its title and ends before the next one."""
    lines = text.split("\n")
    titles = [index for index, line in enumerate(lines) if _TITLE.fullmatch(line.strip())]
    edges = itertools.pairwise([0, *titles, len(lines)])
    return [page for start, stop in edges if (page := "\n".join(lines[start:stop])).strip()]


def rows_of(pages: Sequence[str]) -> list[str]:
    """Return the rows of the dataset `wikitext` on the Hub: the text's lines with their line breaks, blank ones empty.

    The blank line before the first title, which is on no page, is the first row.
    """
    return [line if line.strip() else "" for line in io.StringIO(" \n" + "\n".join(pages))]


def detokenize(page: str) -> str:
    """Remove the spaces of WikiText's tokens as lm-evaluation-harness does (tasks/wikitext), its slips included."""
    text = re.sub("/' [0-9]/", "/'[0-9]/", page.replace("s '", "s'"))  # the replacement is literal there, too
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    for mark in ":;.!?,":
        text = text.replace(f" {mark} ", f"{mark} ")
    for opening, closing in _ENCLOSING:
        enclosed = rf"{re.escape(opening)}([^{re.escape(closing)}]*){re.escape(closing)}"
        text = re.sub(enclosed, lambda match: f"{match[0][0]}{match[1].strip()}{match[0][-1]}", text)
    for count in (4, 3, 2):
        text = text.replace(" ".join("=" * count), "=" * count)
    for before, after in ((" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")):
        text = text.replace(before, after)
    return text
