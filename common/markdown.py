"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table."""
    header, *lines = (f"| {' | '.join(map(str, row))} |" for row in [columns, *rows])
    return "\n".join([header, "|---" * len(columns) + "|", *lines])
