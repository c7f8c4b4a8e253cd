"""
Text to shards:

    python -m data.prepare sample --out shards/sample
    python -m data.prepare files book.txt notes/ records.jsonl --out shards/mine --num_proc 8

Everything is written into a folder beside DIR and renamed at the end, so DIR is whole or not there.
"""

import argparse
import contextlib
import errno
import hashlib
import itertools
import os
import platform
import shutil
import signal
import sys
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import DataError
from data.shards import Manifest, write_shard
from data.sources import file_documents, sample_documents
from data.tokenizer import encode_document, load_tiktoken

# Documents go to the workers in batches of about this many characters: large against the cost of sending them,
# small against the memory of a machine.
_BATCH_CHARACTERS = 1_000_000
_SHARD_TOKENS = 100_000_000  # llm.c's, 200 MB
_SAMPLE_VAL_FRACTION = 0.05


def prepare(documents, out, *, name, source, val_fraction, shard_tokens=_SHARD_TOKENS, num_proc=1):
    """
    Tokenises documents into shards and a manifest.

    A document goes to the validation split by a hash of its text, so exact duplicates never stand on both sides.
    It never crosses two shards: one is closed when the next document would not fit. The bytes written do not
    depend on `num_proc`.

    Args:
        documents: iterable of str.
        out: the folder to make.
        name: the shards' names begin with it: {name}_train_000001.bin, {name}_val_000000.bin (llm.c's numbers).
        source: JSON-able dict for the manifest.
        val_fraction: share of the documents that become validation.
        shard_tokens: most tokens in a shard (a longer document has a shard to itself).
        num_proc: processes that tokenise.

    Returns:
        Manifest.

    Raises:
        DataError: `out` is there already or cannot be written, a document source's own errors, a split without
            documents, a full disk, a process that was killed. Nothing is kept then.
    """
    out = Path(out)
    if os.path.lexists(out):  # a link that leads nowhere too
        raise DataError(f"{out} is there already; remove it or choose another --out")
    if not 0 < val_fraction < 1:
        raise DataError(f"--val_fraction must be between 0 and 1, got {val_fraction}")
    if num_proc < 1 or shard_tokens < 1:
        raise DataError(f"--num_proc and --shard_tokens must be at least 1, got {num_proc} and {shard_tokens}")
    load_tiktoken()  # a missing vocabulary is said here, once, and not by each process
    aside = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        manifest = Manifest(
            source=source,
            split_rule=f"val where blake2b-8 of the UTF-8 text, over 2**64, is below {val_fraction}",
            val_fraction=val_fraction,
            versions=_versions(),
        )
        writers = {
            "val": _ShardWriter(aside, f"{name}_val", "val", 0, shard_tokens, manifest),
            "train": _ShardWriter(aside, f"{name}_train", "train", 1, shard_tokens, manifest),
        }
        with (
            contextlib.closing(_encoded(documents, val_fraction, num_proc)) as encoded,
            tqdm(unit=" tokens", unit_scale=True, disable=not sys.stderr.isatty()) as bar,
        ):
            for number, (is_val, tokens) in enumerate(encoded, start=1):
                writers["val" if is_val else "train"].add(tokens)
                bar.update(len(tokens))
                bar.set_postfix_str(f"{number:,} documents", refresh=False)
        for split, writer in writers.items():
            writer.close()
            if not manifest.total(split, "documents"):
                raise DataError(
                    f"no document fell into the {split} split (val_fraction {val_fraction}): give more documents "
                    "(--separator splits a long text into several) or another --val_fraction"
                )
        manifest.write(aside)
        aside.rename(out)
    except OSError as error:
        what = f"no room for {out} on its disk" if error.errno == errno.ENOSPC else f"{out} was not made: {error}"
        remedy = "make room or choose" if error.errno == errno.ENOSPC else "mend that or choose"
        raise DataError(f"{what}; nothing was kept; {remedy} another --out") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return manifest


def prepare_sample(out, *, val_fraction=_SAMPLE_VAL_FRACTION, num_proc=1):
    """The offline sample corpus; train.py makes it when a recipe asks for it."""
    source = {"kind": "sample", "python": platform.python_version()}
    return prepare(sample_documents(), out, name="sample", source=source, val_fraction=val_fraction, num_proc=num_proc)


def _versions():
    """What the tokens depend on, for the manifest."""
    versions = {"python": platform.python_version(), "tiktoken": metadata.version("tiktoken")}
    with contextlib.suppress(metadata.PackageNotFoundError):  # the rooms run from a checkout, installed or not
        versions["gpt2-repro"] = metadata.version("gpt2-repro")
    return versions


class _ShardWriter:
    """Gathers the documents of one split and writes a shard whenever one is full."""

    def __init__(self, folder, prefix, split, first_number, shard_tokens, manifest):
        self.folder, self.prefix, self.split = folder, prefix, split
        self.number, self.shard_tokens, self.manifest = first_number, shard_tokens, manifest
        self.documents, self.tokens = [], 0

    def add(self, tokens):
        if self.documents and self.tokens + len(tokens) > self.shard_tokens:
            self.close()
        self.documents.append(tokens)
        self.tokens += len(tokens)

    def close(self):
        if not self.documents:
            return
        file = f"{self.prefix}_{self.number:06d}.bin"
        sha256 = write_shard(self.folder / file, np.concatenate(self.documents))
        self.manifest.shards.append(
            {
                "file": file,
                "split": self.split,
                "tokens": self.tokens,
                "documents": len(self.documents),
                "sha256": sha256,
            }
        )
        self.number += 1
        self.documents, self.tokens = [], 0


def _encoded(documents, val_fraction, num_proc):
    """(is_val, tokens) of each document, in order."""
    batches = _batches(documents)
    if num_proc == 1:
        for batch in batches:
            yield from _encode_batch(batch, val_fraction)
        return
    # spawn: the same on every platform, and no fork of a process that has threads.
    pool = ProcessPoolExecutor(num_proc, mp_context=get_context("spawn"), initializer=_start_worker)
    try:
        pending = deque()
        # A few batches ahead of the workers, so that memory stays flat however long the source is.
        for batch in itertools.chain(batches, [None]):
            if batch is not None:
                with _interrupts_held():  # a submit may start a worker
                    pending.append(pool.submit(_encode_batch, batch, val_fraction))
            while pending and (batch is None or len(pending) > 2 * num_proc):
                yield from pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a tokenising process was killed, as a rule for want of memory; try again with a smaller --num_proc"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_held():
    """
    Starts workers that Ctrl-C does not touch: a process takes over its parent's blocked signals.

    A terminal sends Ctrl-C to all processes. It is the parent's to answer: a worker that dies of it may hold the lock
    of the queue, and then the others wait for ever. Windows cannot block signals; there, `_start_worker` has to do.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)  # one that came meanwhile arrives now


def _start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    load_tiktoken()


def _batches(documents):
    batch, characters = [], 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode_batch(batch, val_fraction):
    result = []
    for text in batch:
        # Half a surrogate pair, possible in JSON, is no Unicode text; it becomes U+FFFD.
        content = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
        share = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") / 2**64
        tokens = np.array(encode_document(content.decode()), dtype=np.uint16)
        result.append((share < val_fraction, tokens))
    return result


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description="Text to shards of GPT-2 tokens.")
    sources = parser.add_subparsers(dest="source", required=True)
    sample = sources.add_parser("sample", help="English that every Python carries; needs no network")
    files = sources.add_parser("files", help=".txt and .jsonl files of your own")
    files.add_argument("paths", nargs="+", metavar="PATH", help="files, or folders of them")
    files.add_argument("--text_key", default="text", help="where the text is in a .jsonl record (default: text)")
    files.add_argument(
        "--separator",
        type=lambda text: text.replace(r"\n", "\n").replace(r"\t", "\t"),  # as one types them in a shell
        help=r"what stands between the documents of a .txt file, \n for a line break (default: a file is a document)",
    )
    files.add_argument("--shard_tokens", type=int, default=_SHARD_TOKENS, help="most tokens in a shard")
    for source, fraction in ((sample, _SAMPLE_VAL_FRACTION), (files, 0.01)):
        source.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
        source.add_argument("--num_proc", type=int, default=1, help="processes that tokenise (default: 1)")
        source.add_argument(
            "--val_fraction",
            type=float,
            default=fraction,
            help="share of documents for validation (default: %(default)s)",
        )
    args = parser.parse_args(argv)
    try:
        if args.source == "sample":
            manifest = prepare_sample(args.out, val_fraction=args.val_fraction, num_proc=args.num_proc)
        else:
            manifest = prepare(
                file_documents(args.paths, text_key=args.text_key, separator=args.separator),
                args.out,
                name=Path(args.out).name,
                source={"kind": "files", "paths": args.paths},
                val_fraction=args.val_fraction,
                shard_tokens=args.shard_tokens,
                num_proc=args.num_proc,
            )
    except DataError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted: nothing was kept", file=sys.stderr)
        sys.exit(130)
    for split in ("train", "val"):
        print(
            f"{split:5s}  {manifest.total(split, 'documents'):,} documents, {manifest.total(split, 'tokens'):,} tokens"
        )
    print(f"in     {args.out}")


if __name__ == "__main__":
    main()
