"""Check every byte of a folder of shards.

    python -m data.verify shards/fineweb-edu

With a manifest, every file must exist and match its checksums. Without one, headers and sizes must be consistent and
every token must be in GPT-2's vocabulary. To repair a folder, prepare it again: only damaged shards are made.
"""

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from common.cli import Parser, available_cores, prepare_process, run_command
from common.terminal import progress_bar

if __name__ == "__main__":
    prepare_process()


from data import DataError
from data.manifest import MANIFEST, TOKENIZER, check_finished, read_manifest, shard_tokenizer, unmanaged_shards
from data.shards import HEADER_BYTES, open_shard, scan_shard
from data.tokenizer import GPT2_VOCABULARY, Vocabulary


def _find_problem(path: Path, entry: dict[str, Any] | None, vocabulary: Vocabulary) -> str | None:
    """Return a message with the first bad range of bytes; None if the shard is intact and fits its manifest entry."""
    if not path.is_file():
        return f"{path}: the file is missing"
    try:
        num_tokens = len(open_shard(path, vocabulary=vocabulary))
        if entry is not None and num_tokens != entry["tokens"]:
            says = f"{MANIFEST} says {entry['tokens']:,} (first bad: bytes 8 to 11, the count in the header)"
            return f"{path}: {num_tokens:,} tokens, {says}"
        scan = scan_shard(path, entry["crc32"] if entry else None, vocabulary=vocabulary)
    except (DataError, OSError) as error:
        return str(error)
    if entry is None:
        return None
    if scan["sha256"] != entry["sha256"]:
        return f"{path}: bytes 0 to {HEADER_BYTES - 1:,}, the header, do not match their checksum"
    if scan["documents"] != entry["documents"]:
        return f"{path}: {scan['documents']:,} documents, {MANIFEST} says {entry['documents']:,}"
    return None


def verify(folder: str | Path, *, num_proc: int = 1) -> tuple[list[str], dict[str, str]]:
    """Check all shards of a folder, with or without a manifest, `num_proc` at the same time, and its tokenizer.

    Returns:
        The names of the checked files, and {file name: error message} of the bad ones.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    manifest = read_manifest(folder)
    if manifest is None:
        check_finished(folder)
    vocabulary, entries = GPT2_VOCABULARY, dict[str, dict[str, Any] | None]()
    if manifest is not None:
        vocabulary, entries = manifest.tokenizer.vocabulary, {entry["file"]: entry for entry in manifest.shards}
    elif not (entries := {path.name: None for paths in unmanaged_shards(folder).values() for path in paths}):
        raise DataError(f"{folder}: no {MANIFEST} and no shards in it")
    with ThreadPoolExecutor(num_proc) as pool:  # hashing and reading release the GIL
        find = partial(_find_problem, vocabulary=vocabulary)
        futures = {name: pool.submit(find, folder / name, entry) for name, entry in entries.items()}
        bar = progress_bar(futures.items(), unit=" shards")
        try:
            results = {name: future.result() for name, future in bar}
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)  # only the files that are being read
            raise
    if manifest is not None:
        try:
            shard_tokenizer(folder)
        except DataError as error:
            results[TOKENIZER] = str(error)
    return list(results), {name: problem for name, problem in results.items() if problem}


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m data.verify", description="Check every byte of a folder of shards.")
    parser.add_argument("folder", metavar="DIR", help="a folder from `python -m data.prepare`, or any folder of shards")
    parser.add_argument("--repair", action="store_true", help=argparse.SUPPRESS)  # before 2026-12
    help = "files to read at the same time (default: %(default)s)"
    parser.add_argument("--num_proc", type=int, default=available_cores(), help=help)
    args = parser.parse_args(argv)
    if args.num_proc < 1:
        raise DataError(f"--num_proc must be at least 1, got {args.num_proc}")
    if args.repair:
        raise DataError("--repair is gone; run data.prepare again as before: it makes only damaged shards")
    try:
        checked, problems = verify(args.folder, num_proc=args.num_proc)
    except OSError as error:
        raise DataError(f"{args.folder}: {error}") from error
    for problem in problems.values():
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        print(f"error: {len(problems)} of {len(checked)} files are bad", file=sys.stderr)
        return 1
    has_manifest = (Path(args.folder) / MANIFEST).exists()
    result = "match their checksums" if has_manifest else f"are complete (no {MANIFEST}: no checksums)"
    print(f"{args.folder}: {len(checked)} shards {result}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; see `common.cli.run_command`."""
    return run_command(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
