"""
What the loader delivers, from one process, at T = 1,024 and 512 windows a step (a step of the lecture's):

    python benchmarks/loader.py shards/mine                 # warm and cold, plain and with documents kept apart
    python benchmarks/loader.py shards/mine --seconds 60    # a longer run, for the memory it takes
    python benchmarks/loader.py --ten_billion               # the first batch of 10B tokens, in a sparse set made for it

Cold: the kernel is told to forget the files' pages before each round, and a fresh loader checks each block again.
Memory is RssAnon: what the process holds itself, not the mapped pages of files, which the kernel takes back when it
likes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # `data` is not installed

from data.loader import WindowLoader  # noqa: E402
from data.manifest import Manifest, open_split  # noqa: E402
from data.shards import BLOCK_TOKENS, HEADER_BYTES, MAGIC, VERSION  # noqa: E402

SEQ_LEN, WINDOWS = 1024, 512


def held_megabytes():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line)
    return int(line.split()[1]) / 1024


def forget(folder):
    """Puts the files out of the page cache."""
    for path in folder.glob("*.bin"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def deliver(folder, seconds, boundary, is_cold):
    """(tokens/s, MB held at the end over MB held after the first steps)"""
    if is_cold:
        forget(folder)
    loader = WindowLoader(
        open_split(folder, "train"), seq_len=SEQ_LEN, batch_size=WINDOWS, seed=int(time.time()), boundary=boundary
    )
    started, steps, before = time.perf_counter(), 0, None
    for _ in loader.batches(0, 10**9):
        steps += 1
        if steps == 10:
            before = held_megabytes()
        if time.perf_counter() - started > seconds or (is_cold and steps * WINDOWS > loader.num_windows):
            break
    seconds = time.perf_counter() - started
    return steps * WINDOWS * SEQ_LEN / seconds, held_megabytes() - (before or held_megabytes())


def ten_billion(folder):
    """A set of 10B tokens that takes no room: holes in files, which read as token 0."""
    folder.mkdir(exist_ok=True)
    entries = []
    for number, split in enumerate(["val", *["train"] * 100]):
        tokens = 100_000_000
        name = f"sparse_{split}_{number:06d}.bin"
        header = np.zeros(256, dtype="<i4")
        header[:3] = MAGIC, VERSION, tokens
        with (folder / name).open("wb") as file:
            file.write(header.tobytes())
            file.truncate(HEADER_BYTES + 2 * tokens)
        whole, rest = divmod(tokens, BLOCK_TOKENS)
        crc32 = f"{zlib.crc32(bytes(2 * BLOCK_TOKENS)):08x}" * whole + f"{zlib.crc32(bytes(2 * rest)):08x}"
        entry = {"file": name, "split": split, "part": number, "tokens": tokens, "documents": 0, "sha256": "unknown"}
        entries.append({**entry, "crc32": crc32})
    Manifest(name="sparse", source={"kind": "test"}, split_rule="none", shards=entries).write(folder / "manifest.json")


def first_batch(folder):
    """In a process of its own: seconds for imports, to open the set, and to the first batch."""
    program = (
        "import json, sys, time; t = [time.perf_counter()]; from data.loader import WindowLoader; "
        "from data.manifest import open_split; t.append(time.perf_counter()); "
        "shards = open_split(sys.argv[1], 'train'); t.append(time.perf_counter()); "
        f"loader = WindowLoader(shards, seq_len={SEQ_LEN}, batch_size={WINDOWS}, seed=1); "
        "next(loader.batches(int(sys.argv[2]), 10**9)); t.append(time.perf_counter()); "
        "print(json.dumps([b - a for a, b in zip(t, t[1:])]))"
    )
    for step in (0, 19_000, 1_000_000):  # a fresh run, one resumed at its end, one after 50 epochs
        command = [sys.executable, "-c", program, str(folder), str(step)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        imports, opening, batch = json.loads(done.stdout)
        print(f"| {step:,} | {imports:.2f} | {opening:.2f} | {batch:.2f} | {opening + batch:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="of shards")
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ten_billion", action="store_true")
    args = parser.parse_args()
    if args.ten_billion:
        with tempfile.TemporaryDirectory() as folder:
            ten_billion(Path(folder))
            print("| first step | imports, s | open 100 shards, s | first batch, s | open and first batch, s |")
            print("|---|---|---|---|---|")
            first_batch(Path(folder))
    if args.folder:
        print("| boundary | page cache | M tokens/s | MB more at the end |\n|---|---|---|---|")
        for _ in range(args.rounds):
            for boundary in ("ignore", "document"):
                for is_cold in (False, True):
                    rate, more = deliver(args.folder, args.seconds, boundary, is_cold)
                    print(
                        f"| {boundary} | {'cold' if is_cold else 'warm'} | {rate / 1e6:.1f} | {more:.1f} |", flush=True
                    )


if __name__ == "__main__":
    main()
