"""Time the data loader in one process, at T = 1,024 and 512 windows per step (as in the lecture).

    python -m benchmarks.loader shards/mine                 # warm and cold, with boundary "ignore" and "document"
    python -m benchmarks.loader shards/a shards/b shards/c  # a mixture with equal weights
    python -m benchmarks.loader shards/mine --seconds 60    # longer, to see whether memory grows

Cold: before each turn the files' pages are dropped from the page cache, and a new loader checks each block again.
Memory is RssAnon, the process's own memory: mapped pages of files, which the kernel can reclaim, are not included.
"""

import os
import time
from functools import partial
from pathlib import Path

from benchmarks.harness import make_parser, print_report, take_turns, with_range
from data.loader import WindowLoader
from data.manifest import open_split

SEQ_LEN, WINDOWS = 1024, 512
COLUMNS = ("boundary", "page cache", "M tokens/s", "MB more at the end")


def main() -> None:
    """Parse the arguments, measure and print the table."""
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of shards")
    parser.add_argument("--seconds", type=float, default=5, help="length of each turn")
    args = parser.parse_args()
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


if __name__ == "__main__":
    main()
