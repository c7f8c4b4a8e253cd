"""Make shards from text.

    python -m data.prepare sample --out shards/sample
    python -m data.prepare files book.txt notes/ "logs/**/*.jsonl.zst" --out shards/mine
    python -m data.prepare fineweb-edu --out shards/fineweb-edu
    python -m data.prepare hub --dataset OWNER/NAME --subset S --text_column C --out shards/theirs
    python -m data.prepare pretokenized kjj0/finewebedu10B-gpt2 --out shards/fineweb-edu

The text is read in tasks of up to 8 MB, each tokenized in one process (data/tasks.py), and joined to shards in order
(data/plan.py). An interrupted preparation resumes with the tasks that are missing. Preparing a finished folder again
makes damaged shards again, and only those. The bytes of the shards are always the same.
"""

import argparse
import contextlib
import errno
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from common.cli import (
    Parser,
    available_cores,
    interrupt_exit_code,
    prepare_process,
    print_interrupted,
    run_command,
    say,
)

if __name__ == "__main__":
    prepare_process()

from common.errors import UserError
from common.launch import make_once
from common.terminal import progress_bar
from data import DataError
from data.cluster import EXECUTORS, Cluster
from data.corpora import CORPORA
from data.hub import DatasetSource
from data.manifest import MANIFEST, SPLITS, Manifest, needs_preparing, record_tokenizer
from data.plan import Joiner, entry_of, finish, finished_entries, folder_lock, kept_work, open_plan, remove_plan, reopen
from data.pretokenized import import_shards
from data.shards import MAX_TOKENS, check_space
from data.sources import FileSource, SampleSource, Source
from data.tasks import SPLIT_RULE, Work, Workers, tasks_of
from data.tokenizer import TOKENIZER_BACKENDS, Tokenizer, open_tokenizer
from data.verify import verify

_SHARD_TOKENS = 100_000_000  # llm.c's, 200 MB
VAL_FRACTION, _SAMPLE_VAL_FRACTION = 0.01, 0.05
Log = Callable[[str], object]
_SECONDS_BETWEEN_LINES = 30

# Bytes of shards per byte of input: a token has two bytes and is about 4.3 bytes of English text.
_SHARDS_PER_BYTE = {".parquet": 0.75, ".gz": 1.4, ".zst": 1.7, ".xz": 1.9}


def prepare(
    source: Source,
    out: str | Path,
    *,
    name: str,
    val_fraction: float = VAL_FRACTION,
    shard_tokens: int = _SHARD_TOKENS,
    max_tokens: int | None = None,
    num_proc: int = 1,
    tokenizer: Tokenizer | None = None,
    parse_eos: bool = False,
    cluster: Cluster | None = None,
    log: Log = lambda line: None,
) -> Manifest:
    """Make a folder of shards with a manifest, or resume making it, or repair it.

    The bytes of the shards depend on the documents, the tokenizer's ids, `val_fraction`, `shard_tokens`, `max_tokens`
    and `parse_eos`, but not on `num_proc` or interruptions.

    Args:
        name: prefix of the file names: {name}_train_00000000.bin has 5 digits for the part, 3 for the shard in it.
        val_fraction: fraction of the documents that are drawn for validation. Where that would be fewer than ten, the
            end of the text is validation: a tenth of the tokens, or val_fraction if it is more.
        shard_tokens: maximum number of tokens in a shard (a longer document gets its own shard).
        max_tokens: use only the first tokens of the text.
        num_proc: number of tokenizer processes.
        parse_eos: `<|endoftext|>` in a text (the text of the tokenizer's eos token) separates documents; otherwise it
            is plain characters.
        cluster: the machines that run the tasks; None: this one. On SLURM the result is the plan, without shards.
        log: called with lines for the user.
    """
    out, tokenizer = Path(out), tokenizer or open_tokenizer()
    _check_numbers(val_fraction, num_proc, shard_tokens, max_tokens)
    plan = Manifest(
        name=name,
        source={**source.settings, "parse_eos": parse_eos or None},
        split_rule=SPLIT_RULE,
        val_fraction=val_fraction,
        shard_tokens=shard_tokens,
        max_tokens=max_tokens,
        versions=_versions(tokenizer),
    )
    is_new = False
    try:
        if (out.is_symlink() and not out.exists()) or (out.exists() and not out.is_dir()):
            raise DataError(f"{out} is a {'broken link' if out.is_symlink() else 'file'}; choose another --out")
        if cluster is not None:
            cluster.check()
        was_missing = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        with folder_lock(out):
            is_new = was_missing  # only now: another process may have made the folder, and works in it
            plan = open_plan(plan, source, tokenizer, out)
            before = plan.shards
            if before and not (damaged := _damaged_shards(out, num_proc, log)):
                return plan
            if before:
                plan.tokenizer = record_tokenizer(tokenizer, out)
                plan = reopen(plan, damaged, out)
            _report_plan(plan, source, out, log)
            work = Work(source, tokenizer, out.absolute(), val_fraction, parse_eos)
            if cluster is not None:
                again: dict[str, Any] = {"name": name, "val_fraction": val_fraction, "shard_tokens": shard_tokens}
                again |= {"max_tokens": max_tokens, "tokenizer": tokenizer, "parse_eos": parse_eos}
                if not cluster.run(work, partial(prepare, source, work.out, **again)):
                    is_new = False
                    return plan
            try:
                _run_tasks(plan, work, num_proc, log)
            except UserError as error:
                raise DataError(f"{error}{kept_work(out)}") from error
            manifest = finish(plan, out, before)
        _report_oddities(manifest, tokenizer, parse_eos, log)
        return manifest
    except OSError as error:
        raise _disk_error(error, out) from error
    finally:
        if is_new and out.is_dir() and not kept_work(out) and not (out / MANIFEST).exists():
            shutil.rmtree(out)


def _disk_error(error: OSError, out: str | Path) -> DataError:
    """Return the error with which making a folder ends."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(f"no space for {error.filename or out} on its disk; free some, or use another disk")
    return DataError(f"{out} was not made: {error}; fix that, or prepare into another folder")


def _damaged_shards(out: Path, num_proc: int, log: Log) -> set[str]:
    """Check the shards of a finished folder; return the names of the damaged and missing ones."""
    log(f"{out} is already prepared: checking its shards")
    damaged = {*verify(out, num_proc=num_proc)[1]}
    if damaged:
        log(f"repair    {len(damaged)} files are damaged or missing")
    else:
        remove_plan(out)  # which an interruption may have left
    return damaged


def _report_plan(plan: Manifest, source: Source, out: Path, log: Log) -> None:
    """Say which files are not read and how large the shards will be. Raises DataError if the disk is too small."""
    if isinstance(source, FileSource) and source.skipped:
        names = ", ".join(map(str, source.skipped[:5])) + (", ..." if len(source.skipped) > 5 else "")
        log(f"skipped   {len(source.skipped):,} files of other kinds: {names}")
    done = finished_entries(out)
    tasks = [task for number, inputs in enumerate(plan.inputs) if number not in done for task in inputs]
    needed = sum(task["bytes"] * _SHARDS_PER_BYTE.get(Path(task["path"]).suffix.lower(), 0.5) for task in tasks)
    if plan.max_tokens is not None:
        needed = min(needed, plan.tokenizer.vocabulary.dtype.itemsize * plan.max_tokens)
    log(f"disk      about {needed / 1e9:,.2f} GB needed in {out} (an estimate)")
    check_space(out, needed)


def _run_tasks(plan: Manifest, work: Work, num_proc: int, log: Log) -> None:
    """Run the tasks that are not done, and join them to shards."""
    with ThreadPoolExecutor(1) as executor, Workers(work, num_proc=num_proc) as workers:
        joiner = Joiner(plan, work.out, executor)
        if joiner.finished or joiner.parts:
            log(f"resume    {len(joiner.parts)} parts and {len(joiner.finished)} more tasks are done")
        tasks = (task for number, inputs in enumerate(plan.inputs) for task in tasks_of(work.source, number, inputs))
        # Compressed files are read in pieces, whose share of the bytes is not known.
        total = sum(task["bytes"] for inputs in plan.inputs for task in inputs if not task.get("is_stream"))
        keys, display = workers.run(tasks, joiner.is_done), _Display(total, log)
        with contextlib.closing(keys), contextlib.closing(display):
            for key in keys:
                is_new = not joiner.is_done(key)
                tokens = joiner.add(key)
                inputs = plan.inputs[entry_of(key)]
                num_bytes = 0 if "." in key else sum(task["bytes"] for task in inputs)
                display.update(num_bytes, tokens if is_new else 0)
                if joiner.is_full:
                    break
        joiner.finish()


class _Display:
    """Show the progress: a bar on a terminal, and a line from time to time otherwise."""

    def __init__(self, total: int, log: Log) -> None:
        self._log, self._tokens = log, 0
        self._started = self._last_line = time.monotonic()
        self._bar = progress_bar(total=total, unit="B", unit_scale=True)

    def update(self, num_bytes: int, num_tokens: int) -> None:
        """Count a finished task of `num_bytes`; `num_tokens` are new."""
        self._tokens += num_tokens
        self._bar.set_postfix_str(f"{self._tokens:,} tokens", refresh=False)
        self._bar.update(num_bytes)
        if self._bar.disable and time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._log(self._line())

    def close(self) -> None:
        self._bar.close()
        if self._tokens:
            self._log(self._line())

    def _line(self) -> str:
        seconds = time.monotonic() - self._started
        return f"tokens    {self._tokens:,} in {seconds:,.1f} s, {self._tokens / seconds / 1e6:.2f}M tokens/s"


def prepare_sample_if_missing(out: str | Path) -> None:
    """Prepare the offline sample corpus if nothing is there, or only what an interrupted preparation left."""

    def make() -> None:
        say(f"data      preparing the offline sample corpus in {out}")
        prepare_sample(out)

    make_once(Path(out), lambda: not needs_preparing(out), make)


def prepare_sample(out: str | Path, *, val_fraction: float = _SAMPLE_VAL_FRACTION, **options: Any) -> Manifest:
    """Prepare the offline sample corpus, as train.py does for `--data.prepare_sample`; see `prepare`."""
    return prepare(SampleSource(), out, name="sample", val_fraction=val_fraction, **options)


def _check_numbers(val_fraction: float, num_proc: int, shard_tokens: int, max_tokens: int | None) -> None:
    if not 0 < val_fraction < 1:
        raise DataError(f"--val_fraction must be between 0 and 1, got {val_fraction}")
    if num_proc < 1:
        raise DataError(f"--num_proc must be at least 1, got {num_proc}")
    if not 1 <= shard_tokens <= MAX_TOKENS:
        raise DataError(f"--shard_tokens must be between 1 and {MAX_TOKENS:,}, got {shard_tokens}")
    if max_tokens is not None and max_tokens < 1:
        raise DataError(f"--max_tokens must be at least 1, got {max_tokens}")


def _report_oddities(manifest: Manifest, tokenizer: Tokenizer, parse_eos: bool, log: Log) -> None:
    """Say how many rows had no text, how often the text has the eos token's name in it, and how validation was cut."""
    null_rows, eos_texts = (sum(part[key] for part in manifest.parts) for key in ("null_rows", "eos_texts"))
    if null_rows:
        log(f"skipped   {null_rows:,} rows without a text (null)")
    if eos_texts and not parse_eos:
        log(
            f"note      {tokenizer.eos_text} is in the text {eos_texts:,} times, and was tokenized as plain text; with "
            "--parse_eos it separates documents"
        )
    if manifest.val_from is not None:
        log(f"split     too few documents to draw some for validation: {manifest.split_rule}")


def _versions(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the versions of the software that makes the tokens, for the manifest."""
    versions = {"python": platform.python_version()}
    for package in (tokenizer.backend if tokenizer.is_gpt2 else "tokenizers", "gpt2-repro", "tiktoken"):
        with contextlib.suppress(metadata.PackageNotFoundError):  # a checkout need not be installed
            versions[package] = metadata.version(package)
    return versions


def _parser() -> Parser:
    parser = Parser(
        prog="python -m data.prepare",
        description="Make shards of tokens from text. After an interruption, the same command resumes.",
    )
    commands = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help)

    sample = command("sample", "Python's own documentation; needs no network")
    named = []
    for name, corpus in CORPORA.items():
        named.append(command(name, f"{corpus.dataset}, {corpus.size}, {corpus.license}"))
        named[-1].set_defaults(dataset=corpus.dataset, subset=corpus.subset, max_tokens=corpus.max_tokens)
    hub = command("hub", "any text data set on the Hub")
    files = command("files", "your own files: .txt and .jsonl (also .gz, .xz, .zst), .parquet")
    pretokenized = command("pretokenized", "shards made by others, in llm.c's format or build-nanogpt's .npy")
    datasets, text = (*named, hub), (*named, hub, files)

    def add(sources: Sequence[argparse.ArgumentParser], flags: str, help: str, **options: Any) -> None:
        shown = " (default: %(default)s)" if options.get("default") not in (None, []) else ""
        for source in sources:
            source.add_argument(*flags.split(), help=f"{help}{shown}", **options)

    add([*text, sample, pretokenized], "--out", "the folder to make", required=True, metavar="DIR")
    add([pretokenized], "where", "a data set on the Hub, or a local folder", metavar="OWNER/NAME|FOLDER")
    add([files], "paths", 'files, folders of them, or patterns ("notes/**/*.txt")', nargs="+", metavar="PATH")
    add([hub], "--dataset", "id of the data set on the Hub", required=True, metavar="OWNER/NAME")
    add(datasets, "--subset", "subset of the data set")
    add([*datasets, pretokenized], "--revision", "branch, tag or commit", default="main")
    add(text, "--text_column", "column or key of the text", default="text")
    replace = "for bytes that are not UTF-8: stop, or replace them with U+FFFD"
    add(text, "--errors", replace, choices=("strict", "replace"), default="strict")
    separator = r"text between the documents of a .txt file, \n for a line break; without it, each file is a document"
    add([files], "--separator", separator, type=_unescape)
    add([*text, pretokenized], "--max_tokens", "maximum number of tokens, for example 1e9", type=_integer)
    add(text, "--shard_tokens", "maximum number of tokens in a shard", type=_integer, default=_SHARD_TOKENS)
    add([*text, sample], "--val_fraction", "fraction of the documents for validation", type=float, default=VAL_FRACTION)
    sample.set_defaults(val_fraction=_SAMPLE_VAL_FRACTION)
    add([*text, sample], "--num_proc", "tokenizer processes, one per core", type=int, default=available_cores())
    backend = 'gigatoken gives the same tokens as tiktoken, faster (pip install -e ".[fast]")'
    flags = "--tokenizer_backend --engine"  # the second is the name before 2026-12
    add([*text, sample], flags, backend, choices=TOKENIZER_BACKENDS, default="tiktoken")
    tokenizer = "tokenizer of the shards: a folder, or a name on the Hub; GPT-2's by default"
    add(datasets, "--split", "split of the data set to read", default="train")
    add([*text, sample, pretokenized], "--tokenizer", tokenizer, metavar="NAME")
    add([*text, sample, pretokenized], "--eos_token", "the token between documents, for a tokenizer without one")
    parse = "<|endoftext|> in the text separates documents; by default it is plain characters"
    add(text, "--parse_eos", parse, action="store_true")
    executor = 'slurm and ray use several machines that share DIR (pip install -e ".[cluster]")'
    add(text, "--executor", executor, choices=EXECUTORS, default="local")
    add(text, "--num_tasks", "jobs of slurm or ray that share the tasks", type=int, default=1)
    add(text, "--logging_dir", "datatrove's logs; by default a folder next to DIR", metavar="LOGS")
    slurm = "options of datatrove's SlurmPipelineExecutor: time=02:00:00 partition=cpu cpus_per_task=32"
    add(text, "--slurm", slurm, nargs="+", type=_key_value, default=[], metavar="KEY=VALUE")
    return parser


def _unescape(text: str) -> str:
    r"""Replace \n, \r and \t, as typed in a shell, by line breaks and a tab."""
    return text.replace(r"\n", "\n").replace(r"\r", "\r").replace(r"\t", "\t")


def _integer(text: str) -> int:
    """Parse an int, also written 1e9 or 1_000_000."""
    with contextlib.suppress(ValueError, OverflowError):
        value = float(text)
        if value == int(value):
            return int(value)
    raise argparse.ArgumentTypeError(f"{text!r} is not an integer; write 1000000 or 1e6")


def _key_value(text: str) -> tuple[str, int | str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, int(value) if value.isdecimal() else value


def _text_source(args: argparse.Namespace) -> Source:
    """Return the source that the arguments describe."""
    if args.source == "sample":
        return SampleSource()
    if args.source == "files":
        return FileSource(args.paths, text_column=args.text_column, separator=args.separator, errors=args.errors)
    return DatasetSource(
        args.dataset,
        subset=args.subset,
        split=args.split,
        revision=args.revision,
        text_column=args.text_column,
        errors=args.errors,
    )


def _prepare(args: argparse.Namespace) -> Manifest:
    name = "sample" if args.source == "sample" else Path(args.out).resolve().name
    if args.source == "pretokenized":
        if args.tokenizer is None and args.eos_token is not None:
            raise DataError(f"--eos_token {args.eos_token!r} needs --tokenizer, the one that made the shards")
        tokenizer = None if args.tokenizer is None else open_tokenizer(args.tokenizer, eos_token=args.eos_token)
        options = {"name": name, "revision": args.revision, "max_tokens": args.max_tokens}
        try:
            return import_shards(args.where, args.out, tokenizer=tokenizer, log=say, **options)
        except OSError as error:
            raise _disk_error(error, args.out) from error
    tokenizer = open_tokenizer(args.tokenizer, eos_token=args.eos_token, backend=args.tokenizer_backend)
    names = ("val_fraction", "shard_tokens", "max_tokens", "num_proc", "parse_eos")
    options = {option: getattr(args, option) for option in names if hasattr(args, option)}
    if getattr(args, "executor", "local") != "local":
        logs = args.logging_dir or f"{Path(args.out).absolute()}-logs"
        options["cluster"] = Cluster(args.executor, args.num_tasks, Path(logs).absolute(), dict(args.slurm))
    return prepare(_text_source(args), args.out, name=name, tokenizer=tokenizer, log=say, **options)


def _main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(_check_removed(sys.argv[1:] if argv is None else argv))
    try:
        manifest = _prepare(args)
    except KeyboardInterrupt:
        if args.source == "pretokenized" or (Path(args.out) / MANIFEST).exists():
            raise  # what was downloaded or made before is there
        print_interrupted(f"interrupted{kept_work(args.out) or ': nothing was kept'}")
        return interrupt_exit_code()
    if not manifest.shards:
        print(f"submitted {args.out}: SLURM runs its tasks, and then a job that joins them")
        return 0
    for split in SPLITS:
        documents, tokens = (manifest.total(split, key) for key in ("documents", "tokens"))
        print(f"{split:9s} {documents:,} documents, {tokens:,} tokens")
    print(f"in        {args.out}")
    return 0


def _check_removed(argv: Sequence[str]) -> Sequence[str]:
    """Raise DataError for what this command could do before 2026-12."""
    several = "several machines: --executor slurm or ray"
    removed = dict.fromkeys(("merge", "--shard_index", "--shard_count"), several)
    removed["--keep_parquet"] = "leave it out: nothing is downloaded as a file any more"
    for word in [*argv[:1], *(word for word in argv if word.startswith("--"))]:
        if (remedy := removed.get(word.partition("=")[0])) is not None:
            raise DataError(f"{word} is gone; {remedy}")
    return argv


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; see `common.cli.run_command`."""
    return run_command(_main, argv, on_interrupt="interrupted: run the same command to resume")


if __name__ == "__main__":
    sys.exit(main())
