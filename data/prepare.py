"""Make shards from text.

    python -m data.prepare sample --out shards/sample
    python -m data.prepare fineweb-edu --out shards/fineweb-edu
    python -m data.prepare hub --dataset OWNER/NAME --subset S --text_column C --out shards/theirs
    python -m data.prepare files book.txt notes/ "logs/**/*.jsonl.zst" --out shards/mine
    python -m data.prepare pretokenized kjj0/finewebedu10B-gpt2 --out shards/fineweb-edu

The input files are grouped into parts; a large file gets its own part. Each part is fetched, tokenized, written, read
again and recorded (plan.py, parts.py). The shards of a part depend only on the part. So an interrupted preparation
resumes at the first missing part, and several machines can divide the parts (--shard_index, --shard_count); the bytes
of the shards are the same.
"""

import argparse
import contextlib
import errno
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from common.cli import Parser, interrupt_exit_code, prepare_process, print_interrupted, run_command, say, shell_quote

if __name__ == "__main__":
    prepare_process()

from tqdm import tqdm

from common.errors import UserError
from data import DataError
from data.corpora import CORPORA
from data.encode import SPLIT_RULE
from data.hub import HubRepository, HubSource
from data.manifest import SPLITS, Manifest, needs_preparing
from data.nanogpt import nanogpt_tokenizer
from data.parts import PartMaker
from data.plan import (
    CUT_RULE,
    DOWNLOADS,
    Source,
    finish,
    has_finished_work,
    is_complete,
    kept_parts,
    merge,
    open_plan,
    part_lock,
    part_records,
    write_part_record,
)
from data.pretokenized import HubShards, LocalShards
from data.shards import MAX_TOKENS
from data.sources import FileSource, SampleSource
from data.tokenizer import GPT2_VOCABULARY, TOKENIZER_BACKENDS, Tokenizer, Vocabulary, load_tokenizer

_SHARD_TOKENS = 100_000_000  # llm.c's, 200 MB
_SAMPLE_VAL_FRACTION = 0.05

# Bytes of shards per byte of input: a token has two bytes and is about 4.3 bytes of English text.
_SHARDS_PER_BYTE = {".txt": 0.5, ".jsonl": 0.5, ".parquet": 0.75, ".gz": 1.4, ".zst": 1.7, ".xz": 1.9}


def prepare(
    source: Source,
    out: str | Path,
    *,
    name: str,
    val_fraction: float | None = None,
    shard_tokens: int = _SHARD_TOKENS,
    max_tokens: int | None = None,
    num_proc: int = 1,
    tokenizer: Tokenizer | None = None,
    parse_eos: bool = False,
    shard_index: int = 0,
    shard_count: int = 1,
    log: Callable[[str], object] = lambda line: None,
) -> Manifest | None:
    """Make a folder of shards with a manifest, or resume making it.

    A document is never split over two shards. The bytes of the shards depend on the source, `val_fraction`,
    `shard_tokens`, `max_tokens`, `parse_eos` and the tokenizer's ids, but not on `num_proc`, `shard_count` or
    interruptions. If no document is drawn for validation, the last part of the tokens is cut off for it, see plan.py.

    Args:
        source: documents, see data.sources, or shards to import, see data.pretokenized.
        name: prefix of the file names: {name}_train_00000000.bin has 5 digits for the part, 3 for the shard in it.
        val_fraction: fraction of the documents for validation; None for imported shards.
        shard_tokens: maximum number of tokens in a shard (a longer document gets its own shard).
        max_tokens: maximum number of tokens in all shards; the last document is the last one that fits.
        num_proc: number of tokenizer processes.
        tokenizer: None: GPT-2's.
        parse_eos: `<|endoftext|>` in a text (the text of the tokenizer's eos token) separates documents; otherwise it
            is plain characters.
        shard_index: index of the first part to prepare, of every shard_count-th.
        log: called with lines for the user.

    Returns:
        The manifest; None if other machines have not prepared their parts yet.

    Raises:
        UserError: the folder has other content, the source failed, a split has no documents, the disk is full, or a
            process was killed. Finished parts are kept.
    """
    out = Path(out)
    _check_numbers(val_fraction, num_proc, shard_tokens, max_tokens, shard_index, shard_count)
    tokenizer = tokenizer or load_tokenizer()
    is_text = val_fraction is not None
    plan = Manifest(
        name=name,
        source={**source.settings, "parse_eos": parse_eos or None} if is_text else source.settings,
        split_rule=SPLIT_RULE if is_text else "by the names of the imported files",
        val_fraction=val_fraction,
        shard_tokens=shard_tokens if is_text else None,
        max_tokens=max_tokens,
        versions=_versions(tokenizer),
    )
    is_new = not out.exists()
    try:
        plan = open_plan(plan, source, tokenizer, out)
        if plan.shards:
            log(f"{out} is already prepared: nothing to do")
            return finish(out)  # completes an interrupted cleanup
        parts = [part for part in range(plan.num_parts) if part % shard_count == shard_index]
        if isinstance(source, FileSource) and source.skipped:
            names = ", ".join(map(str, source.skipped[:5])) + (", ..." if len(source.skipped) > 5 else "")
            log(f"skipped   {len(source.skipped):,} files of other kinds: {names}")
        _check_disk(plan, source, out, parts, log)
        _prepare_parts(plan, source, out, parts, num_proc=num_proc, tokenizer=tokenizer, log=log)
        _report_oddities(out, tokenizer, parse_eos, log)
        manifest = finish(out)
        if manifest is not None and manifest.split_rule.startswith(CUT_RULE):
            log(f"split     too few documents to draw some for validation: {manifest.split_rule}")
        return manifest
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = error.filename or out
            raise DataError(f"no space for {where} on its disk; free some or choose another --out") from error
        raise DataError(f"{out} was not made: {error}; fix that or choose another --out") from error
    finally:
        if is_new and shard_count == 1 and out.is_dir() and not has_finished_work(out):
            shutil.rmtree(out)


def prepare_sample_if_missing(out: str | Path) -> None:
    """Prepare the offline sample corpus if nothing is there, or only what an interrupted preparation left."""
    if needs_preparing(out):
        say(f"data      preparing the offline sample corpus in {out}")
        prepare_sample(out)


def prepare_sample(out: str | Path, *, val_fraction: float = _SAMPLE_VAL_FRACTION, **options: Any) -> Manifest | None:
    """Prepare the offline sample corpus, as train.py does for `--data.prepare_sample`; see `prepare`."""
    return prepare(SampleSource(), out, name="sample", val_fraction=val_fraction, **options)


def _check_numbers(
    val_fraction: float | None,
    num_proc: int,
    shard_tokens: int,
    max_tokens: int | None,
    shard_index: int,
    shard_count: int,
) -> None:
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise DataError(f"--val_fraction must be between 0 and 1, got {val_fraction}")
    if num_proc < 1:
        raise DataError(f"--num_proc must be at least 1, got {num_proc}")
    if not 1 <= shard_tokens <= MAX_TOKENS:
        raise DataError(f"--shard_tokens must be between 1 and {MAX_TOKENS:,}, got {shard_tokens}")
    if max_tokens is not None and max_tokens < 1:
        raise DataError(f"--max_tokens must be at least 1, got {max_tokens}")
    if not 0 <= shard_index < shard_count:
        raise DataError(f"--shard_index must be between 0 and --shard_count - 1, got {shard_index} of {shard_count}")
    if max_tokens is not None and shard_count > 1:
        raise DataError("--max_tokens needs all parts in order, and --shard_count divides them: give only one of them")


def _report_oddities(out: Path, tokenizer: Tokenizer, parse_eos: bool, log: Callable[[str], object]) -> None:
    """Say how many rows had no text, and how often the text has the eos token's name in it."""
    records = part_records(out).values()
    null_rows, eos_texts = (sum(record.get(key, 0) for record in records) for key in ("null_rows", "eos_texts"))
    if null_rows:
        log(f"skipped   {null_rows:,} rows without a text (null)")
    if eos_texts and not parse_eos:
        log(
            f"note      {tokenizer.eos_text} is in the text {eos_texts:,} times, and was tokenized as plain text; "
            "with --parse_eos it separates documents"
        )


def _versions(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the versions of the software that makes the tokens, for the manifest."""
    package = tokenizer.backend if tokenizer.is_gpt2 else "tokenizers"
    versions = {"python": platform.python_version(), package: metadata.version(package)}
    for package in ("gpt2-repro", "tiktoken"):
        with contextlib.suppress(metadata.PackageNotFoundError):  # a checkout need not be installed
            versions[package] = metadata.version(package)
    return versions


def _check_disk(plan: Manifest, source: Source, out: Path, parts: Sequence[int], log: Callable[[str], object]) -> None:
    finished = part_records(out)
    files = [file for file in plan.inputs if file["part"] in parts and file["part"] not in finished]
    if isinstance(source, LocalShards) or not files:
        return
    sizes = sorted((file["bytes"] for file in files), reverse=True)
    if isinstance(source, HubShards):
        needed = sum(sizes)
    else:
        needed = sum(file["bytes"] * _SHARDS_PER_BYTE.get(Path(file["path"]).suffix, 0.5) for file in files)
        if plan.max_tokens is not None:
            needed = min(needed, 2 * plan.max_tokens)
    if isinstance(source, HubSource):
        needed += sum(sizes) if source.keep else sum(sizes[:2])  # one is read while the next is downloaded
    free = shutil.disk_usage(out).free
    log(f"disk      about {needed / 1e9:,.2f} GB needed in {out} (an estimate), {free / 1e9:,.1f} GB free")
    if needed > free:
        raise DataError(
            f"{out} needs about {needed / 1e9:,.2f} GB (an estimate), but its disk has only {free / 1e9:,.2f} GB free; "
            "free some space, choose another --out, or give --max_tokens"
        )


def _prepare_parts(
    plan: Manifest,
    source: Source,
    out: Path,
    parts: Sequence[int],
    *,
    num_proc: int,
    tokenizer: Tokenizer,
    log: Callable[[str], object],
) -> None:
    finished = part_records(out)
    if is_complete(plan, finished):
        return
    pending = [part for part in parts if part not in finished]
    if len(pending) < len(parts):
        log(f"resume    {len(parts) - len(pending)} of {len(parts)} parts are done")
    with PartMaker(
        plan,
        source,
        out,
        parts,
        finished=finished.keys(),
        tokens_before=sum(shard["tokens"] for record in finished.values() for shard in record["shards"]),
        num_proc=num_proc,
        tokenizer=tokenizer,
        log=log,
    ) as maker:
        for part in pending:
            with part_lock(out, part):
                record = maker.make(part)
                write_part_record(out, record)
                maker.release_inputs()
            if record["is_full"]:
                return


def source_of(
    settings: Mapping[str, Any],
    *,
    out: str | Path,
    keep: bool = False,
    max_tokens: int | None = None,
    vocabulary: Vocabulary = GPT2_VOCABULARY,
) -> Source:
    """Make the source that has these settings.

    Args:
        settings: settings of a source, or `Manifest.source`, which also has the provenance.
        out: the folder to make; downloads go into it.
    """
    kind = settings["kind"]
    options = {key: settings[key] for key in ("text_column", "separator", "errors") if key in settings}
    if kind == "sample":
        return SampleSource()
    if kind == "files":
        return FileSource(settings["paths"], **options)
    if "dataset" not in settings:
        return LocalShards(settings["folder"], max_tokens=max_tokens, vocabulary=vocabulary)
    repository = HubRepository(
        settings["dataset"],
        revision=settings["asked_revision"],
        commit=settings.get("revision"),
        download_folder=Path(out) / DOWNLOADS,
    )
    if kind == "hub":
        return HubSource(repository, subset=settings["subset"], keep=keep, **options)
    return HubShards(repository, max_tokens=max_tokens, vocabulary=vocabulary)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m data.prepare",
        description="Make shards of GPT-2 tokens from text. After an interruption, the same command resumes.",
    )
    commands = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help)

    sample = command("sample", "Python's own documentation; needs no network")
    named = {
        name: command(name, f"{corpus.about}; {corpus.license}; 10 billion tokens by default")
        for name, corpus in CORPORA.items()
    }
    hub = command("hub", "any text data set on the Hub")
    files = command("files", "your own files: .txt and .jsonl (also .gz, .xz, .zst), .parquet")
    pretokenized = command("pretokenized", "shards made by others, in llm.c's format or build-nanogpt's .npy")
    merging = command("merge", "merge the folders that --shard_count made on several machines")
    datasets, text = (*named.values(), hub), (*named.values(), hub, files)

    def add(sources: Sequence[argparse.ArgumentParser], flag: str, help: str, **options: Any) -> None:
        shown = " (default: %(default)s)" if options.get("default") is not None else ""
        for source in sources:
            source.add_argument(flag, help=f"{help}{shown}", **options)

    add([*text, sample, pretokenized, merging], "--out", "the folder to make", required=True, metavar="DIR")
    add([merging], "folders", "the folders to merge", nargs="+", metavar="PART_DIR")
    add([pretokenized], "where", "a data set on the Hub, or a local folder", metavar="OWNER/NAME|FOLDER")
    add([files], "paths", 'files, folders of them, or patterns ("notes/**/*.txt")', nargs="+", metavar="PATH")
    add([hub], "--dataset", "id of the data set on the Hub", required=True, metavar="OWNER/NAME")
    add(datasets, "--subset", "subset of the data set")
    add(datasets, "--keep_parquet", "keep the downloaded files, in DIR/downloads", action="store_true")
    add([*datasets, pretokenized], "--revision", "branch, tag or commit", default="main")
    add(text, "--text_column", "column or key of the text", default="text")
    replace = "for bytes that are not UTF-8: stop, or replace them with U+FFFD"
    add(text, "--errors", replace, choices=("strict", "replace"), default="strict")
    separator = r"text between the documents of a .txt file, \n for a line break; without it, each file is a document"
    add([hub, files], "--separator", separator, type=_unescape)
    add([*text, pretokenized], "--max_tokens", "maximum number of tokens, for example 1e9", type=_integer)
    for name, corpus in CORPORA.items():
        named[name].set_defaults(dataset=corpus.dataset, subset=corpus.subset, max_tokens=corpus.max_tokens)
    add([*text, pretokenized], "--shard_index", "index of this machine, below --shard_count", type=int, default=0)
    add([*text, pretokenized], "--shard_count", "number of machines that divide the files", type=int, default=1)
    add(text, "--shard_tokens", "maximum number of tokens in a shard", type=_integer, default=_SHARD_TOKENS)
    fraction = "fraction of the documents for validation"
    add(text, "--val_fraction", fraction, type=float, default=0.01)
    add([sample], "--val_fraction", fraction, type=float, default=_SAMPLE_VAL_FRACTION)
    add([*text, sample], "--num_proc", "tokenizer processes, one per core by default", type=int, default=_cores())
    backend = 'gigatoken gives the same tokens as tiktoken, faster (pip install -e ".[fast]")'
    add([*text, sample], "--tokenizer_backend", backend, choices=TOKENIZER_BACKENDS, default="tiktoken")
    name = "tokenizer of the shards: a folder, or a name on the Hub; GPT-2's by default"
    add([*text, sample, pretokenized], "--tokenizer", name, metavar="NAME")
    add([*text, sample, pretokenized], "--eos_token", "the token between documents, for a tokenizer without one")
    parse = "<|endoftext|> in the text separates documents; by default it is plain characters"
    add(text, "--parse_eos", parse, action="store_true")
    for source in (*text, sample):
        source.add_argument("--engine", choices=TOKENIZER_BACKENDS, help=argparse.SUPPRESS)  # the name before 2026-12
    return parser


def _unescape(text: str) -> str:
    """Replace backslash-n and backslash-t, as typed in a shell, by a line break and a tab."""
    return text.replace(r"\n", "\n").replace(r"\t", "\t")


def _integer(text: str) -> int:
    """Parse an int, also written 1e9 or 1_000_000."""
    with contextlib.suppress(ValueError, OverflowError):
        value = float(text)
        if value == int(value):
            return int(value)
    raise argparse.ArgumentTypeError(f"{text!r} is not an integer; write 1000000 or 1e6")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the source that the arguments describe."""
    if args.source == "sample":
        return {"kind": "sample"}
    if args.source == "pretokenized":
        if Path(args.where).is_dir() or args.where.count("/") != 1 or args.where.startswith((".", "~", "/")):
            return {"kind": "pretokenized", "folder": args.where}
        return {"kind": "pretokenized", "dataset": args.where, "asked_revision": args.revision}
    settings = {"text_column": args.text_column, "errors": args.errors, "separator": getattr(args, "separator", None)}
    if args.source == "files":
        return {**settings, "kind": "files", "paths": args.paths}
    names = {"dataset": args.dataset, "subset": args.subset, "asked_revision": args.revision}
    return {**settings, "kind": "hub", **names}


def _prepare_or_merge(args: argparse.Namespace) -> Manifest | None:
    if args.source == "merge":
        return merge(args.folders, args.out)
    settings = _settings(args)
    backend = getattr(args, "tokenizer_backend", "tiktoken")
    tokenizer = load_tokenizer(args.tokenizer, eos_token=args.eos_token, backend=backend)
    if args.tokenizer is None and "folder" in settings:
        tokenizer = nanogpt_tokenizer(settings["folder"]) or tokenizer
    source = source_of(
        settings,
        out=args.out,
        keep=getattr(args, "keep_parquet", False),
        max_tokens=getattr(args, "max_tokens", None),
        vocabulary=tokenizer.vocabulary,
    )
    names = (
        "val_fraction",
        "shard_tokens",
        "max_tokens",
        "num_proc",
        "parse_eos",
        "shard_index",
        "shard_count",
    )
    options = {name: getattr(args, name) for name in names if hasattr(args, name)}
    name = "sample" if args.source == "sample" else Path(args.out).resolve().name
    return prepare(source, args.out, name=name, tokenizer=tokenizer, log=tqdm.write, **options)


def _main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    if getattr(args, "engine", None) is not None:
        print("--engine is now called --tokenizer_backend", file=sys.stderr)
        args.tokenizer_backend = args.engine
    try:
        manifest = _prepare_or_merge(args)
    except UserError as error:
        raise DataError(f"{error}{kept_parts(args.out)}") from error
    except KeyboardInterrupt:
        print_interrupted(f"interrupted{kept_parts(args.out) or ': nothing was kept'}")
        return interrupt_exit_code()
    if manifest is None:
        print(
            f"parts {args.shard_index}, {args.shard_index + args.shard_count}, ... are done in {args.out}. If all "
            "machines write to this folder, the last one merges the parts. Otherwise run:\n"
            f"python -m data.prepare merge {shell_quote(args.out)} ... --out DIR"
        )
        return 0
    for split in SPLITS:
        documents, tokens = (manifest.total(split, key) for key in ("documents", "tokens"))
        print(f"{split:9s} {documents:,} documents, {tokens:,} tokens")
    print(f"in        {args.out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; see `common.cli.run_command`."""
    return run_command(_main, argv, on_interrupt="interrupted: run the same command to resume")


if __name__ == "__main__":
    sys.exit(main())
