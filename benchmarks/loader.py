"""Time the data loader in one process, at T = 1,024 and 512 windows per step (as in the lecture).

    python -m benchmarks.loader shards/mine                 # warm and cold, with boundary "ignore" and "document"
    python -m benchmarks.loader shards/a shards/b shards/c  # a mixture with equal weights
    python -m benchmarks.loader shards/mine --seconds 60    # longer, to see whether memory grows
    python -m benchmarks.loader --ten_billion               # time to the first batch of 10B tokens, in sparse files

Cold: before each turn the files' pages are dropped from the page cache, and a new loader checks each block again.
Memory is RssAnon, the process's own memory: mapped pages of files, which the kernel can reclaim, are not included.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.harness import make_parser, print_report, take_turns, with_range
from common.markdown import table
from data.loader import WindowLoader
from data.manifest import Manifest, open_split
from data.shards import BLOCK_TOKENS, HEADER_BYTES, MAGIC, VERSION

SEQ_LEN, WINDOWS = 1024, 512
COLUMNS = ("boundary", "page cache", "M tokens/s", "MB more at the end")
FIRST_BATCH_COLUMNS = ("first step", "imports, s", "open 100 shards, s", "first batch, s", "open and first batch, s")
# In a fresh process: seconds for the imports, to open the shards, and to the first batch.
FIRST_BATCH = f"""
import json, sys, time
times = [time.perf_counter()]
from data.loader import WindowLoader
from data.manifest import open_split
times.append(time.perf_counter())
shards = open_split(sys.argv[1], "train")
times.append(time.perf_counter())
loader = WindowLoader([shards], seq_len={SEQ_LEN}, batch_size={WINDOWS}, seed=1)
next(loader.batches(int(sys.argv[2]), 10**9))
times.append(time.perf_counter())
print(json.dumps([after - before for before, after in zip(times, times[1:])]))
"""


def main() -> None:
    """Parse the arguments, measure and print the tables."""
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("folders", nargs="*", type=Path, help="folders of shards")
    parser.add_argument("--seconds", type=float, default=5, help="length of each turn")
    parser.add_argument("--ten_billion", action="store_true", help="measure the first batch of 10B tokens")
    args = parser.parse_args()
    if args.ten_billion:
        with tempfile.TemporaryDirectory() as folder:
            write_sparse_shards(Path(folder))
            # A new run, one resumed at its end, and one after 50 epochs.
            rows = [first_batch(folder, step) for step in (0, 19_000, 1_000_000)]
        print(table(FIRST_BATCH_COLUMNS, rows))
    if args.folders:
        candidates = {
            f"{boundary} {cache}": partial(deliver, args.folders, args.seconds, boundary, cache == "cold")
            for boundary in ("ignore", "document")
            for cache in ("warm", "cold")
        }
        results = take_turns(candidates, args.rounds, lambda result: f"{result[0]:.1f}M tokens/s")
        rows = [
            [*name.split(), *(with_range(values, ".1f") for values in zip(*turns, strict=True))]
            for name, turns in results.items()
        ]
        print_report(f"T = {SEQ_LEN:,}, {WINDOWS} windows per step", args.rounds, COLUMNS, rows)


def deliver(folders: list[Path], seconds: float, boundary: str, is_cold: bool) -> tuple[float, float]:
    """Read batches, at most one epoch if `is_cold`. Return (M tokens/s, MB that memory grew after the first steps)."""
    if is_cold:
        for folder in folders:
            drop_from_page_cache(folder)
    loader = WindowLoader(
        [open_split(folder, "train") for folder in folders],
        weights=[1.0] * len(folders),
        seq_len=SEQ_LEN,
        batch_size=WINDOWS,
        seed=int(time.time()),
        boundary=boundary,
    )
    start, steps, before = time.perf_counter(), 0, None
    for _ in loader.batches(0, 10**9):
        steps += 1
        if steps == 10:
            before = own_megabytes()
        if time.perf_counter() - start > seconds or (is_cold and max(loader.epochs(steps)) >= 1):
            break
    rate = steps * WINDOWS * SEQ_LEN / (time.perf_counter() - start)
    return rate / 1e6, own_megabytes() - (before or own_megabytes())


def own_megabytes() -> float:
    """Return this process's RssAnon in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line)
    return int(line.split()[1]) / 1024


def drop_from_page_cache(folder: Path) -> None:
    """Remove the shards' pages from the kernel's page cache."""
    for path in folder.glob("*.bin"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def write_sparse_shards(folder: Path) -> None:
    """Write 10B tokens that take no disk space: holes in files, which read as token 0."""
    entries = []
    for number, split in enumerate(["val", *["train"] * 100]):
        tokens = 100_000_000
        name = f"sparse_{split}_{number:06d}.bin"
        header = np.zeros(256, dtype="<i4")
        header[:3] = MAGIC, VERSION, tokens
        with (folder / name).open("wb") as file:
            file.write(header.tobytes())
            file.truncate(HEADER_BYTES + 2 * tokens)
        num_blocks, rest = divmod(tokens, BLOCK_TOKENS)
        crc32 = f"{zlib.crc32(bytes(2 * BLOCK_TOKENS)):08x}" * num_blocks + f"{zlib.crc32(bytes(2 * rest)):08x}"
        entry = {"file": name, "split": split, "part": number, "tokens": tokens, "documents": 0, "sha256": "unknown"}
        entries.append({**entry, "crc32": crc32})
    Manifest(name="sparse", source={"kind": "test"}, split_rule="none", shards=entries).write(folder / "manifest.json")


def first_batch(folder: str, step: int) -> list[str]:
    """Measure FIRST_BATCH. Return a row of the table."""
    command = [sys.executable, "-c", FIRST_BATCH, folder, str(step)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    imports, opening, batch = json.loads(done.stdout)
    return [f"{step:,}", *(f"{seconds:.2f}" for seconds in (imports, opening, batch, opening + batch))]


if __name__ == "__main__":
    main()
