"""
Text from a checkpoint, as it is written:

    python sample.py runs/sample/checkpoints/best "Return a list of"
    python sample.py openai-community/gpt2 "Hello, I'm a language model," --n 3 --temperature 0.8
    echo "Once upon a time" | python sample.py CHECKPOINT
    python sample.py CHECKPOINT --chatty          your lines and the model's in turns, one text

The checkpoint is a folder of train.py's, any other that `from_pretrained` opens, or a model's id on the Hub.
"""

import logging
import sys

from common.cli import Parser, prepare_process, run_command

if __name__ == "__main__":
    prepare_process()

from eval.checkpoint import check_name, load_model, load_tokenizer
from eval.command import find_device
from hub import HubError
from hub.continuation import Settings, continuation, encode_prompt, text_pieces


def _parse_arguments(arguments):
    parser = Parser(prog="sample.py", description="Continues a text with a language model.", allow_abbrev=False)
    parser.add_argument("checkpoint", help="a checkpoint's folder, or the id of a model on the Hub")
    parser.add_argument("prompt", nargs="?", help="what to continue; without it, standard input is read")
    parser.add_argument(
        "--temperature", type=float, default=Settings().temperature, help="0: always the most probable token"
    )
    parser.add_argument(
        "--top_k", type=int, default=Settings().top_k, help="of the k most probable tokens; 0: all (default: 50)"
    )
    parser.add_argument(
        "--top_p", type=float, default=Settings().top_p, help="of the tokens that have this probability together"
    )
    parser.add_argument("--max_new_tokens", type=int, default=Settings().max_new_tokens, help="(default: 100)")
    parser.add_argument("--n", type=int, default=1, help="so many continuations")
    parser.add_argument("--seed", type=int, default=Settings().seed, help="of the first; each more has the next")
    parser.add_argument(
        "--chatty",
        action="store_true",
        help="a loop: what you type and what the model writes become one text; an empty line begins a new one",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    parser.add_argument("--device", help="cuda, mps or cpu; by default the first of them that is there")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the modeling code of a model from the Hub"
    )
    return parser.parse_args(arguments)


def write(model, tokenizer, prompt_ids, settings):
    """Prints a continuation as it comes. Returns its tokens."""
    written = []

    def tokens():
        for step in continuation(model, prompt_ids, settings):
            written.append(step.token)
            yield step.token

    for piece in text_pieces(tokenizer, tokens()):
        print(piece, end="", flush=True)
    print()
    if len(prompt_ids) + len(written) == model.config.max_position_embeddings:
        print(f"(the model's context of {model.config.max_position_embeddings:,} tokens is full)", file=sys.stderr)
    return written


def chat(model, tokenizer, settings):
    """Lines of the user's and the model's words in turns, until the end of the input or Ctrl-C at the prompt."""
    context = model.config.max_position_embeddings
    ids = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not line:
            ids = []
            continue
        try:
            ids += encode_prompt(tokenizer, line if not ids else f"\n{line}", model.config)
        except HubError as error:  # a line that is too long, and the conversation goes on
            print(f"({error})", file=sys.stderr)
            continue
        # Half of the context is for what comes: the oldest words make room.
        ids = ids[-max(context - settings.max_new_tokens, context // 2) :]
        ids += write(model, tokenizer, ids, settings)
        settings = settings._replace(seed=settings.seed + 1)


def _main(arguments):
    import modeling_gpt2repro  # noqa: F401 (the Auto classes know it then)

    args = _parse_arguments(arguments)
    settings = Settings(args.temperature, args.top_k, args.top_p, args.max_new_tokens, args.seed)
    settings.check()
    if args.n < 1:
        raise HubError(f"n must be at least 1, got {args.n}")
    if args.chatty and (args.prompt is not None or args.n > 1):
        raise HubError("--chatty asks for prompts itself, one at a time: leave out the prompt and --n")
    args.checkpoint = check_name(args.checkpoint)
    trust = args.trust_remote_code
    tokenizer, _ = load_tokenizer(args.checkpoint, trust_remote_code=trust)
    device, _ = find_device(args.device)
    prompt = args.prompt
    if prompt is None and not args.chatty:
        if sys.stdin.isatty():
            print("what to continue? (Ctrl-D ends it)", file=sys.stderr)
        prompt = sys.stdin.read().removesuffix("\n")
    model = load_model(args.checkpoint, dtype=args.dtype, device=device, trust_remote_code=trust).eval()
    if args.chatty:
        chat(model, tokenizer, settings)
        return
    prompt_ids = encode_prompt(tokenizer, prompt, model.config)
    for i in range(args.n):
        if args.n > 1:
            print(f"--- {i + 1}")
        print(prompt, end="", flush=True)
        write(model, tokenizer, prompt_ids, settings._replace(seed=settings.seed + i))


def main(arguments=None):
    """Run the command and return its exit code; see `common.cli.run_command`."""

    def run(arguments):
        try:
            _main(arguments)
        except BrokenPipeError:
            raise
        except OSError as error:  # a full disk behind standard output
            raise HubError(f"the text cannot be written: {error}") from error

    return run_command(run, arguments, on_interrupt="stopped")


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # the libraries' chatter; what matters of it is checked and said here
    sys.exit(main())
