"""
How fast text becomes tokens, in turns on the same documents:

    python benchmarks/tokenize.py corpus/*.txt --separator '\\n<|endoftext|>\\n' --num_proc 2 --rounds 3

    tiktoken        tiktoken alone: each process encodes its share of documents that are in its memory already
    lecture         build-nanogpt's fineweb.py: multiprocessing's imap over single documents, shards filled as they come
    tokenizers      Hugging Face tokenizers' batch call, with as many threads
    prepare         the whole `python -m data.prepare` command: start, read, tokenise, write, hash, verify
    prepare-giga    the same with --engine gigatoken

Prints a table for RECORDS.md: medians (lowest to highest), and medians of the ratios to `tiktoken` within a round.
"""

import argparse
import importlib.util
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.machinery import PathFinder
from pathlib import Path

if __name__ == "tokenize":
    # The other benchmarks' folder is this one, and what they import wants the standard library's module of this name.
    spec = PathFinder.find_spec("tokenize", [str(Path(os.__file__).parent)])
    sys.modules["tokenize"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["tokenize"])

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for `data`, which is not installed; imported in functions, because of the above


def encode_share(documents, connection):
    """A process of `tiktoken`: waits for the start, encodes, tells how many tokens."""
    from data.tokenizer import load_tiktoken

    encoding = load_tiktoken()
    connection.send("ready")
    connection.recv()
    connection.send(sum(len(encoding.encode_ordinary(text)) for text in documents))


def tiktoken_alone(documents, num_proc, **_):
    context = multiprocessing.get_context("spawn")
    connections, processes = [], []
    for share in range(num_proc):
        ours, theirs = context.Pipe()
        # Dealt out like cards, so that each has as much.
        process = context.Process(target=encode_share, args=(documents[share::num_proc], theirs))
        process.start()
        connections.append(ours)
        processes.append(process)
    for connection in connections:
        connection.recv()
    started = time.perf_counter()
    for connection in connections:
        connection.send("go")
    for connection in connections:
        connection.recv()
    seconds = time.perf_counter() - started
    for process in processes:
        process.join()
    return seconds


def encode_one(text):
    """A document of `lecture`, as build-nanogpt's tokenize()."""
    import numpy as np

    from data.tokenizer import EOT, load_tiktoken

    tokens = np.array([EOT, *load_tiktoken().encode_ordinary(text)])
    if not ((tokens >= 0).all() and (tokens < 2**16).all()):
        raise ValueError("a token does not fit")
    return tokens.astype(np.uint16)


def lecture(documents, num_proc, num_tokens, **_):
    import numpy as np

    with multiprocessing.get_context("spawn").Pool(num_proc) as pool:
        pool.map(encode_one, ["warm up"] * num_proc)
        started = time.perf_counter()
        shard, count = np.empty((num_tokens,), dtype=np.uint16), 0
        for tokens in pool.imap(encode_one, documents, chunksize=16):
            shard[count : count + len(tokens)] = tokens
            count += len(tokens)
        return time.perf_counter() - started


def tokenizers_batch(documents, **_):
    from data.tokenizer import load_hf_tokenizer

    tokenizer = load_hf_tokenizer()
    tokenizer(documents[:10])
    started = time.perf_counter()
    for start in range(0, len(documents), 1000):
        tokenizer(documents[start : start + 1000])
    return time.perf_counter() - started


def prepare(documents, num_proc, paths, separator, engine="tiktoken", **_):
    folder = Path(tempfile.mkdtemp())
    command = [sys.executable, "-m", "data.prepare", "files", *paths, "--out", folder / "out", "--num_proc", num_proc]
    command += ["--engine", engine, *(["--separator", separator] if separator else [])]
    started = time.perf_counter()
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    return seconds


def prepare_with_gigatoken(documents, **options):
    return prepare(documents, **options, engine="gigatoken")


CANDIDATES = {
    "tiktoken": tiktoken_alone,
    "lecture": lecture,
    "tokenizers": tokenizers_batch,
    "prepare": prepare,
    "prepare-giga": prepare_with_gigatoken,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=lambda path: str(Path(path).resolve()))
    parser.add_argument("--separator", type=lambda text: text.replace(r"\n", "\n"))
    parser.add_argument("--num_proc", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    args = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(args.num_proc)

    from data.sources import FileSource, Progress, document
    from data.tokenizer import load_tiktoken

    source = FileSource(args.paths, separator=args.separator)
    documents = [
        document(record) for file in source.inputs() for record in source.records(file, source.fetch(file), Progress(0))
    ]
    encoding = load_tiktoken()
    num_tokens = sum(1 + len(encoding.encode_ordinary(text)) for text in documents)
    print(f"{len(documents):,} documents, {sum(map(len, documents)):,} characters, {num_tokens:,} tokens", flush=True)

    rates = {name: [] for name in args.candidates}
    for _ in range(args.rounds):
        for name in args.candidates:
            options = {"num_proc": args.num_proc, "num_tokens": num_tokens}
            options |= {"paths": args.paths, "separator": args.separator}
            rates[name].append(num_tokens / CANDIDATES[name](documents, **options))
            print(f"{name:14s} {rates[name][-1] / 1e6:.2f}M tokens/s", flush=True)
    print("\n| candidate | M tokens/s | a core | over tiktoken alone |\n|---|---|---|---|")
    for name, found in rates.items():
        million = [rate / 1e6 for rate in found]
        ratios = [rate / base for rate, base in zip(found, rates.get("tiktoken", found), strict=True)]
        print(
            f"| {name} | {statistics.median(million):.2f} ({min(million):.2f} to {max(million):.2f}) "
            f"| {statistics.median(million) / args.num_proc:.2f} | {statistics.median(ratios):.2f} |"
        )


if __name__ == "__main__":
    main()
