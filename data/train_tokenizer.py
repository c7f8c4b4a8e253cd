"""Train a byte-level BPE with GPT-2's pre-tokenization, and `<|endoftext|>` as its eos token.

python -m data.tokenizer train my_text/ --vocab_size 16384 --out shards/my_tokenizer
python -m data.prepare files my_text/ --tokenizer shards/my_tokenizer --out shards/mine
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from common.cli import Parser, run_command
from data import DataError
from data.sources import FileSource
from data.tokenizer import EOT_TEXT, Tokenizer, make_tokenizer, pieces

_MIN_VOCAB_SIZE = 257  # the bytes, and the eos token


def train_tokenizer(source: FileSource, out: str | Path, *, vocab_size: int) -> Tokenizer:
    """Train on the texts of a source, and save the tokenizer as a folder that AutoTokenizer opens.

    Memory grows with the number of different words, not with the length of the text.
    """
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    out, target = Path(out), Path(out).absolute()  # it may be ".", which has no path once it is removed
    if vocab_size < _MIN_VOCAB_SIZE:
        raise DataError(f"--vocab_size must be at least {_MIN_VOCAB_SIZE} (256 bytes and {EOT_TEXT}), got {vocab_size}")
    trained = FastTokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    try:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise DataError(f"--out {str(out)!r} exists and is not an empty folder: name another, or remove it")
        trained.train_from_iterator(_texts(source), trainer)
        tokenizer = make_tokenizer(str(out), trained.to_str())
        if target.exists():
            target.rmdir()  # an error if files were put there during the training
        tokenizer.save(target)
    except OSError as error:
        raise DataError(f"--out {str(out)!r} was not made ({error}): fix that, or name another") from error
    return tokenizer


def _texts(source: FileSource) -> Iterator[str]:
    is_empty = True
    for task in source.tasks():
        for document in source.documents(task):
            text = document.text or ""
            is_empty = is_empty and not text
            yield from (text[begin:end] for begin, end in pieces(text))
    if is_empty:
        raise DataError(f"{', '.join(source.paths)}: no text to train on; give files with text")


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m data.tokenizer", description="Make a tokenizer for your own text.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train a byte-level BPE", description="Train a byte-level BPE.")
    train.add_argument("paths", nargs="+", metavar="PATH", help="files, folders or patterns, as for data.prepare files")
    train.add_argument("--vocab_size", type=int, default=16384, help="number of tokens (default: %(default)s)")
    train.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
    train.add_argument("--text_column", default="text", help="column or key of the text (default: %(default)s)")
    args = parser.parse_args(argv)
    source = FileSource(args.paths, text_column=args.text_column)
    tokenizer = train_tokenizer(source, args.out, vocab_size=args.vocab_size)
    if tokenizer.vocab_size < args.vocab_size:
        print(f"the text has no more pairs to merge than for {tokenizer.vocab_size:,} tokens")
    print(f"{tokenizer.vocab_size:,} tokens in {args.out}: `python -m data.prepare ... --tokenizer {args.out}` uses it")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; see `common.cli.run_command`."""
    return run_command(_main, argv)
