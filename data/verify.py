"""
Check every byte of a folder of shards.

    python -m data.verify shards/fineweb-edu
    python -m data.verify shards/fineweb-edu --repair

With a manifest, every file must exist and match its checksums. Without one, headers and sizes must be consistent and
every token must be in GPT-2's vocabulary. Errors name the first bad range of bytes. --repair makes the parts with
damaged or missing shards again from their source, and uses the new shards only if they match the manifest.
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
from data.manifest import MANIFEST, PREPARING, read_manifest, unmanaged_shards
from data.parts import make_part
from data.prepare import source_of
from data.shards import HEADER_BYTES, open_shard, scan_shard

_REPAIR = ".repair"


def find_problem(folder: str | Path, entry: dict[str, Any]) -> str | None:
    """
    Compare a shard with its entry in the manifest.

    Args:
        folder: the manifest's folder.
        entry: one of the manifest's shards.

    Returns:
        An error message with the first bad range of bytes; None if the shard is intact.
    """
    path = Path(folder) / entry["file"]
    if not path.is_file():
        return f"{path}: the file is missing"
    try:
        shard = open_shard(path)
        if len(shard) != entry["tokens"]:
            return (
                f"{path}: {len(shard):,} tokens, {MANIFEST} says {entry['tokens']:,} "
                f"(first bad: bytes 8 to 11, the count in the header)"
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
    """
    Check all shards of a folder.

    Args:
        folder: a folder of shards, with or without a manifest.
        num_proc: number of files to read at the same time.

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
    if manifest is None:
        paths = [path for paths in unmanaged_shards(folder).values() for path in paths]
        if not paths:
            raise DataError(f"{folder}: no {MANIFEST} and no shards in it")
        checks = {path.name: lambda path=path: _find_problem_without_manifest(path) for path in paths}
    else:
        checks = {entry["file"]: lambda entry=entry: find_problem(folder, entry) for entry in manifest.shards}
    with ThreadPoolExecutor(num_proc) as pool:  # hashing and reading release the GIL
        futures = {name: pool.submit(check) for name, check in checks.items()}
        results = {
            name: future.result()
            for name, future in tqdm(futures.items(), unit=" shards", disable=not sys.stderr.isatty())
        }
    return list(results), {name: problem for name, problem in results.items() if problem}


def _find_problem_without_manifest(path: Path) -> str | None:
    try:
        scan_shard(path)
    except DataError as error:
        return str(error)
    return None


def repair(folder: str | Path, *, num_proc: int = 1, log: Callable[[str], object] = print) -> None:
    """
    Make the damaged shards of a folder again, and only those.

    Args:
        folder: a folder of shards with a manifest.
        num_proc: number of tokenizer processes, and of files to read at the same time.
        log: called with lines for the user.

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
            made = {
                entry["file"]: entry for entry in make_part(manifest, source, part, repair_folder, num_proc=num_proc)
            }
            for entry in damaged:
                if entry["part"] != part:
                    continue
                if made.get(entry["file"]) != entry:
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
