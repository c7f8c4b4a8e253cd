"""Check every byte of a folder of shards.

    python -m data.verify shards/fineweb-edu
    python -m data.verify shards/fineweb-edu --repair

With a manifest, every file must exist and match its checksums. Without one, headers and sizes must be consistent and
every token must be in GPT-2's vocabulary. --repair makes the parts with damaged or missing shards again from their
source, and uses the new shards only if they match the manifest.
"""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common.cli import Parser, prepare_process, run_command

if __name__ == "__main__":
    prepare_process()

from tqdm import tqdm

from common.files import replace_file
from data import DataError
from data.manifest import MANIFEST, PREPARING, read_manifest, shard_tokenizer, unmanaged_shards
from data.parts import PartMaker
from data.plan import CUT_RULE
from data.prepare import source_of
from data.shards import HEADER_BYTES, open_shard, scan_shard

_REPAIR = ".repair"


def _find_problem(path: Path, entry: dict[str, Any] | None) -> str | None:
    """Return a message with the first bad range of bytes; None if the shard is intact and fits its manifest entry."""
    if not path.is_file():
        return f"{path}: the file is missing"
    try:
        if entry is None:
            scan_shard(path)
            return None
        num_tokens = len(open_shard(path))
        if num_tokens != entry["tokens"]:
            return (
                f"{path}: {num_tokens:,} tokens, {MANIFEST} says {entry['tokens']:,} "
                "(first bad: bytes 8 to 11, the count in the header)"
            )
        scan = scan_shard(path, entry["crc32"])
    except (DataError, OSError) as error:
        return str(error)
    if scan["sha256"] != entry["sha256"]:
        return f"{path}: bytes 0 to {HEADER_BYTES - 1:,}, the header, do not match their checksum"
    if scan["documents"] != entry["documents"]:
        return f"{path}: {scan['documents']:,} documents, {MANIFEST} says {entry['documents']:,}"
    return None


def verify(folder: str | Path, *, num_proc: int = 1) -> tuple[list[str], dict[str, str]]:
    """Check all shards of a folder, with or without a manifest, `num_proc` at the same time.

    Returns:
        The names of the checked files, and {file name: error message} of the bad ones.

    Raises:
        DataError: the folder has no shards or is not finished, or its manifest is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    manifest = read_manifest(folder)
    if manifest is None and (folder / PREPARING).exists():
        raise DataError(f"{folder} is not finished: run the same `python -m data.prepare` command again")
    entries: dict[str, dict[str, Any] | None]
    if manifest is not None:
        entries = {entry["file"]: entry for entry in manifest.shards}
    else:
        entries = {path.name: None for paths in unmanaged_shards(folder).values() for path in paths}
        if not entries:
            raise DataError(f"{folder}: no {MANIFEST} and no shards in it")
    with ThreadPoolExecutor(num_proc) as pool:  # hashing and reading release the GIL
        futures = {name: pool.submit(_find_problem, folder / name, entry) for name, entry in entries.items()}
        bar = tqdm(futures.items(), unit=" shards", disable=not sys.stderr.isatty())
        results = {name: future.result() for name, future in bar}
    return list(results), {name: problem for name, problem in results.items() if problem}


def repair(folder: str | Path, *, num_proc: int = 1, log: Callable[[str], object] = print) -> None:
    """Make the damaged shards of a folder again, and only those.

    Raises:
        DataError: the folder has no manifest, the source is missing or has changed, or the shards were imported.
    """
    folder = Path(folder)
    _, problems = verify(folder, num_proc=num_proc)
    if not problems:
        return
    manifest = read_manifest(folder)
    if manifest is None:
        raise DataError(f"{folder} has no {MANIFEST}, which names the source of the shards; copy the bad files again")
    if manifest.source["kind"] == "pretokenized" and "dataset" not in manifest.source:
        raise DataError(f"the shards of {folder} were imported; copy these again: {', '.join(sorted(problems))}")
    if manifest.split_rule.startswith(CUT_RULE):
        raise DataError(f"{folder}: {manifest.split_rule}, which is only cut when all is prepared: prepare it again")
    repair_folder = folder / _REPAIR
    source = source_of(manifest.source, out=repair_folder)
    if manifest.source["kind"] == "sample" and source.settings["python"] != manifest.source["python"]:
        raise DataError(
            f"the sample in {folder} is from Python {manifest.source['python']}, but this is Python "
            f"{source.settings['python']}; repair it with Python {manifest.source['python']}, or prepare it again"
        )
    damaged = [entry for entry in manifest.shards if entry["file"] in problems]
    shutil.rmtree(repair_folder, ignore_errors=True)
    try:
        for part in sorted({entry["part"] for entry in damaged}):
            log(f"repair    making part {part} again")
            repair_folder.mkdir(exist_ok=True)
            tokens_before = sum(entry["tokens"] for entry in manifest.shards if entry["part"] < part)
            with PartMaker(
                manifest,
                source,
                repair_folder,
                [part],
                tokens_before=tokens_before,
                num_proc=num_proc,
                tokenizer=shard_tokenizer(folder),
            ) as maker:
                made = maker.make(part)["shards"]
            for entry in (entry for entry in damaged if entry["part"] == part):
                if entry not in made:
                    raise DataError(
                        f"{folder / entry['file']} cannot be made again: the source's documents have changed "
                        "(its files, or the program that reads them); prepare the folder again"
                    )
                replace_file(repair_folder / entry["file"], folder / entry["file"])
                log(f"repair    {entry['file']} is repaired")
    finally:
        shutil.rmtree(repair_folder, ignore_errors=True)


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m data.verify", description="Check every byte of a folder of shards.")
    parser.add_argument("folder", metavar="DIR", help="a folder from `python -m data.prepare`, or any folder of shards")
    parser.add_argument("--repair", action="store_true", help="make damaged or missing shards again from their source")
    parser.add_argument(
        "--num_proc",
        type=int,
        default=os.cpu_count() or 1,
        help="files to read at the same time (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if args.num_proc < 1:
        raise DataError(f"--num_proc must be at least 1, got {args.num_proc}")
    try:
        if args.repair:
            repair(args.folder, num_proc=args.num_proc)
        checked, problems = verify(args.folder, num_proc=args.num_proc)
    except OSError as error:
        raise DataError(f"{args.folder}: {error}") from error
    for problem in problems.values():
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        print(f"error: {len(problems)} of {len(checked)} shards are bad", file=sys.stderr)
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
