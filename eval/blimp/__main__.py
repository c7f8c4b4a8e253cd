"""Print BLiMP's results by paradigm, next to the published ones of OpenAI's gpt2-large.

python -m eval.blimp RESULTS.json, a file from `python -m eval --tasks blimp --output RESULTS.json`. The published
results (published.csv names their source) are not reproduced here, and their protocol is not documented.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from common.cli import Parser, prepare_process, run_command

if __name__ == "__main__":
    prepare_process()

from common.markdown import table
from eval import EvalError
from eval.blimp.task import PARADIGMS, PHENOMENA

PUBLISHED = "gpt2-large, published (not reproduced here)"


def paradigm_table(metrics: dict[str, float | None]) -> str:
    """Return a Markdown table of BLiMP's metrics: overall, then each phenomenon and its paradigms."""
    rows: list[tuple[str, str, str, str]] = []

    def add(name: str, label: str, published: float) -> None:
        value, error = metrics.get(name), metrics.get(f"{name}_stderr")
        text, stderr = (f"{x:.4f}" if x is not None else "" for x in (value, error))
        rows.append((label, text, stderr, f"{published:.4f}"))

    add("acc", "**overall**", fmean(paradigm.gpt2_large for paradigm in PARADIGMS.values()))
    for phenomenon in PHENOMENA:
        own = {name: paradigm.gpt2_large for name, paradigm in PARADIGMS.items() if paradigm.phenomenon == phenomenon}
        add(phenomenon, f"**{phenomenon}**", fmean(own.values()))
        for name, published in own.items():
            add(name, name, published)
    return table(("phenomenon, paradigm", "acc", "standard error", PUBLISHED), rows)


def _main(arguments: Sequence[str] | None) -> None:
    parser = Parser(prog="python -m eval.blimp", description="Print BLiMP's results by paradigm, in Markdown.")
    parser.add_argument("results", type=Path, metavar="RESULTS.json", help="a file from python -m eval --output")
    path = parser.parse_args(arguments).results
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        metrics, source = result["results"]["blimp"], result["tasks"]["blimp"]["data"]["source"]
        text = f"{result['model']['name']}, {source}\n\n{paradigm_table(metrics)}"
    except OSError as error:
        raise EvalError(f"{str(path)!r} cannot be read ({error.strerror}); give a file from python -m eval") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvalError(f"{str(path)!r} has no results of blimp; make it with python -m eval --output") from error
    print(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 2 for an error that the user can fix, on one line of stderr."""
    return run_command(_main, arguments)


if __name__ == "__main__":
    sys.exit(main())
