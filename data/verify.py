"""
Checks a folder of shards, to the last byte:

    python -m data.verify shards/fineweb-edu
    python -m data.verify shards/fineweb-edu --repair

Against the manifest: that every file is there, whole, and what was written. Without one: that headers and sizes fit and
that GPT-2 has every token. What is wrong is said with the first bad range of bytes. --repair makes damaged or missing
shards again from their source (the same parts, and no others), and takes them only if they are what the manifest says.
"""

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.cli import Parser, prepare_process, run_command

if __name__ == "__main__":
    prepare_process()

from tqdm import tqdm

from common.files import replace_file
from data import DataError
from data.manifest import MANIFEST, PREPARING, unmanaged_shards, read_manifest
from data.prepare import make_part, source_of
from data.shards import HEADER_BYTES, open_shard, scan_shard

_REPAIR = ".repair"


def find_problem(folder, entry):
    """
    Args:
        folder: of the manifest.
        entry: one of its shards.

    Returns:
        what is wrong with the file, with the first bad range of bytes; None for a whole one.
    """
    path = Path(folder) / entry["file"]
    if not path.is_file():
        return f"{path}: the file is missing"
    try:
        shard = open_shard(path)
        if len(shard) != entry["tokens"]:
            return (
                f"{path}: {len(shard):,} tokens, {MANIFEST} says {entry['tokens']:,} "
                f"(first bad: bytes 8 to 11, the header's count)"
            )
        found = scan_shard(path, entry["crc32"])
    except (DataError, OSError) as error:
        return str(error)
    if found["sha256"] != entry["sha256"]:
        return f"{path}: bytes 0 to {HEADER_BYTES - 1:,}, the header, are not what was written"
    if found["documents"] != entry["documents"]:
        return f"{path}: {found['documents']:,} documents, {MANIFEST} says {entry['documents']:,}"
    return None


def verify(folder, *, num_proc=1):
    """
    Args:
        folder: of shards.
        num_proc: files read at the same time.

    Returns:
        (list of what was checked, {file name: what is wrong with it}).

    Raises:
        DataError: no folder of shards, one that is not finished, a damaged manifest.
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
    with ThreadPoolExecutor(num_proc) as pool:  # hashing and reading leave the interpreter's lock alone
        futures = {name: pool.submit(check) for name, check in checks.items()}
        results = {
            name: future.result()
            for name, future in tqdm(futures.items(), unit=" shards", disable=not sys.stderr.isatty())
        }
    return list(results), {name: problem for name, problem in results.items() if problem}


def _find_problem_without_manifest(path):
    try:
        scan_shard(path)
    except DataError as error:
        return str(error)
    return None


def repair(folder, *, num_proc=1, log=print):
    """
    Makes the damaged shards of a folder again, and no others.

    Args:
        folder: with a manifest.
        num_proc: processes that tokenise, files that are read at the same time.
        log: called with lines for the user.

    Raises:
        DataError: there is no manifest, the source is gone or has changed, or the shards lie elsewhere.
    """
    folder = Path(folder)
    _, problems = verify(folder, num_proc=num_proc)
    if not problems:
        return
    manifest = read_manifest(folder)
    if manifest is None:
        raise DataError(f"{folder} has no {MANIFEST} that says where the shards came from; copy the bad files again")
    if manifest.source["kind"] == "pretokenized" and "dataset" not in manifest.source:
        raise DataError(f"the shards in {folder} were made elsewhere; copy these again: {', '.join(sorted(problems))}")
    repair_folder = folder / _REPAIR
    source = source_of(manifest.source, out=repair_folder)
    if manifest.source["kind"] == "sample" and source.settings["python"] != manifest.source["python"]:
        raise DataError(
            f"the sample in {folder} is of Python {manifest.source['python']}, and this is "
            f"{source.settings['python']}; repair it with that one, or prepare it again"
        )
    damaged = [entry for entry in manifest.shards if entry["file"] in problems]
    shutil.rmtree(repair_folder, ignore_errors=True)
    try:
        for part in sorted({entry["part"] for entry in damaged}):
            log(f"repair    making part {part} again")
            repair_folder.mkdir(exist_ok=True)
            made = {entry["file"]: entry for entry in make_part(manifest, source, part, repair_folder, num_proc=num_proc)}
            for entry in damaged:
                if entry["part"] != part:
                    continue
                if made.get(entry["file"]) != entry:
                    raise DataError(
                        f"{folder / entry['file']} cannot be made again: the source gives other documents than it did "
                        "(its files, or the program that reads them, have changed); prepare the folder again"
                    )
                replace_file(repair_folder / entry["file"], folder / entry["file"])
                log(f"repair    {entry['file']} is as it was")
    finally:
        shutil.rmtree(repair_folder, ignore_errors=True)


def _main(argv):
    parser = Parser(prog="python -m data.verify", description="Checks a folder of shards.")
    parser.add_argument(
        "folder", metavar="DIR", help="as `python -m data.prepare` leaves it, or of other people's shards"
    )
    parser.add_argument("--repair", action="store_true", help="make damaged or missing shards again from their source")
    parser.add_argument(
        "--num_proc", type=int, default=os.cpu_count() or 1, help="files at a time (default: %(default)s)"
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
    what = (
        "are what was written"
        if (Path(args.folder) / MANIFEST).exists()
        else f"are whole (no {MANIFEST}: no checksums)"
    )
    print(f"{args.folder}: {len(checked)} shards {what}")
    return 0


def main(argv=None):
    """Run the command and return its exit code; see `common.cli.run_command`."""
    return run_command(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
