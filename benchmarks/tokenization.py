r"""Time tokenization: tiktoken alone and `python -m data.prepare`.

    python -m benchmarks.tokenization corpus/*.txt --separator '\n<|endoftext|>\n' --num_proc 2 --rounds 3

    tiktoken        tiktoken alone: each process encodes its share of documents that are already in its memory
    prepare         the full `python -m data.prepare` command: start, read, tokenize, write, hash, verify
    prepare-giga    the same with --tokenizer_backend gigatoken

All encode the same documents and take turns. Prints a table for RECORDS.md.
"""

import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from typing import Any

from benchmarks.harness import make_parser, median_ratio, print_report, take_turns, with_range
from data.sources import FileSource
from data.tokenizer import load_tiktoken

CANDIDATES = ("tiktoken", "prepare", "prepare-giga")
COLUMNS = ("candidate", "M tokens/s", "a core", "over tiktoken alone")
_worker: dict[str, Any] = {}  # in a process of the pool: its barrier and documents


def main() -> None:
    """Parse the arguments, measure and print the table."""
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("paths", nargs="+", metavar="FILE", help="the corpus, as for `python -m data.prepare files`")
    parser.add_argument("--separator", type=lambda text: text.replace(r"\n", "\n"), help="what separates documents")
    parser.add_argument("--num_proc", type=int, default=2, help="processes or threads")
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=CANDIDATES)
    args = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(args.num_proc)

    source = FileSource(args.paths, separator=args.separator)
    documents = [document.text for task in source.tasks() for document in source.documents(task) if document.text]
    encoding = load_tiktoken()
    num_tokens = sum(1 + len(encoding.encode_ordinary(text)) for text in documents)
    print(f"{len(documents):,} documents, {sum(map(len, documents)):,} characters, {num_tokens:,} tokens", flush=True)

    measures: dict[str, Callable[[], float]] = {
        "tiktoken": lambda: tiktoken_alone(documents, args.num_proc),
        "prepare": lambda: prepare(args.paths, args.separator, args.num_proc, "tiktoken"),
        "prepare-giga": lambda: prepare(args.paths, args.separator, args.num_proc, "gigatoken"),
    }
    candidates = {name: measures[name] for name in args.candidates}
    seconds = take_turns(candidates, args.rounds, lambda seconds: f"{num_tokens / seconds / 1e6:.2f}M tokens/s")
    results = {name: [num_tokens / value / 1e6 for value in values] for name, values in seconds.items()}
    rows = []
    for name, rates in results.items():
        per_core = f"{statistics.median(rates) / args.num_proc:.2f}"
        rows.append([name, with_range(rates, ".2f"), per_core, median_ratio(rates, results.get("tiktoken", []))])
    print_report(f"{num_tokens:,} tokens, {args.num_proc} processes", args.rounds, COLUMNS, rows)


def tiktoken_alone(documents: list[str], num_proc: int) -> float:
    """Return the seconds that processes take to encode documents that are in their memory."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(num_proc, _start_worker, (context.Barrier(num_proc), documents)) as pool:
        pool.map(_meet, range(num_proc), chunksize=1)  # until each has loaded tiktoken and the documents
        start = time.perf_counter()
        pool.map(_encode_share, range(num_proc), chunksize=1)
        return time.perf_counter() - start


def _start_worker(barrier: Barrier, documents: list[str]) -> None:
    load_tiktoken()
    _worker.update(barrier=barrier, documents=documents)


def _meet(_: int) -> None:
    """Wait for the other processes, so that each takes one task."""
    _worker["barrier"].wait()


def _encode_share(number: int) -> None:
    """Encode every num_proc-th document, so that each process has about the same amount of text."""
    _meet(number)
    for text in _worker["documents"][number :: _worker["barrier"].parties]:
        load_tiktoken().encode_ordinary(text)


def prepare(paths: list[str], separator: str | None, num_proc: int, backend: str) -> float:
    """Return the seconds of the full data.prepare command."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "data.prepare", "files", *paths, "--out", f"{folder}/out"]
        command += ["--num_proc", str(num_proc), "--tokenizer_backend", backend]
        command += ["--separator", separator] if separator else []
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
