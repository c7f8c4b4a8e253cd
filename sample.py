"""Print text from a checkpoint while the model writes it.

    python sample.py runs/sample/checkpoints/best "Return a list of"
    python sample.py openai-community/gpt2 "Hello, I'm a language model," --n 3 --temperature 0.8
    echo "Once upon a time" | python sample.py CHECKPOINT
    python sample.py CHECKPOINT --interactive     your lines and the model's in turns: one text, or a conversation

If the tokenizer has a chat template, --interactive is a chat: the lines are messages, and the model answers them.

The checkpoint is a folder of train.py's, any other that `from_pretrained` opens, or a model's id on the Hub.
"""

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Sequence

from common.cli import Parser, prepare_process, run_command

if __name__ == "__main__":
    prepare_process()

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

import modeling_gpt2repro  # noqa: F401 (registers the Auto classes)
from common.models import check_name, find_device, load_model, load_tokenizer
from hub import HubError
from hub.sampling import SamplingParams, context_of, encode_chat, encode_prompt, stream_tokens


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="sample.py", description="Continue a text with a language model.", allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", help="a checkpoint's folder, or the id of a model on the Hub")
    add("prompt", nargs="?", help="text to continue (default: read standard input)")
    add("--temperature", type=float, default=SamplingParams.temperature, help="0: greedy (default: 1)")
    add("--top_k", type=int, default=SamplingParams.top_k, help="most probable tokens; 0: all (default: 50)")
    add("--top_p", type=float, default=SamplingParams.top_p, help="their total probability (default: 1)")
    add("--max_new_tokens", type=int, default=SamplingParams.max_new_tokens, help="(default: 100)")
    add("--n", type=int, default=1, help="number of continuations")
    add("--seed", type=int, default=SamplingParams.seed, help="of the first continuation; the next has seed+1")
    add("--interactive", action="store_true", help="chat, or continue lines as one text; an empty line starts again")
    add("--chatty", action="store_true", help=argparse.SUPPRESS)  # the name before 2026-12
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    add("--device", help="cuda, mps or cpu (default: the first that is available)")
    add("--trust_remote_code", action="store_true", help="run the modeling code of a model from the Hub")
    args = parser.parse_args(arguments)
    if args.chatty:
        print("--chatty is now called --interactive", file=sys.stderr)
        args.interactive = True
    if args.n < 1:
        raise HubError(f"n must be at least 1, got {args.n}")
    if args.interactive and (args.prompt is not None or args.n > 1):
        raise HubError("--interactive reads prompts itself, one at a time: leave out the prompt and --n")
    return args


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], params: SamplingParams
) -> list[int]:
    """Print a continuation while it is generated, and a line break at its end. Return its tokens."""
    streamer = TextStreamer(tokenizer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    new_ids = []
    for token, _ in stream_tokens(model, prompt_ids, params):
        new_ids.append(token)
        streamer.put(torch.tensor([token]))
    streamer.end()
    context = model.config.max_position_embeddings
    if len(prompt_ids) + len(new_ids) == context:
        print(f"(the model's context of {context:,} tokens is full)", file=sys.stderr)
    return new_ids


def interact(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, params: SamplingParams) -> None:
    """Answer the user's lines: as messages of a conversation if there is a chat template, otherwise as one text.

    An empty line begins another conversation or text. The end of the input, or Ctrl-C at the prompt, is the end.
    Raises HubError, see `context_of`.
    """
    context = context_of(model.config)
    messages: list[dict[str, str]] = []
    ids: list[int] = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not line:
            messages, ids = [], []
            continue
        try:
            if tokenizer.chat_template:
                question = {"role": "user", "content": line}
                messages, ids = encode_chat(tokenizer, [*messages, question], model.config, params)
            else:
                ids = ids + encode_prompt(tokenizer, f"\n{line}" if ids else line, model.config)
                # Drop the oldest tokens, so that up to half of the context is free for the continuation.
                ids = ids[-max(context - params.max_new_tokens, context // 2) :]
        except HubError as error:  # the line is too long: keep what there is
            print(f"({error})", file=sys.stderr)
            continue
        new_ids = write(model, tokenizer, ids, params)
        ids = ids + new_ids
        messages.append({"role": "assistant", "content": str(tokenizer.decode(new_ids))})
        params = dataclasses.replace(params, seed=params.seed + 1)


def _sample(arguments: Sequence[str] | None) -> None:
    args = _parse_arguments(arguments)
    settings = {field.name: getattr(args, field.name) for field in dataclasses.fields(SamplingParams)}
    params = SamplingParams(**settings)
    name, trust = check_name(args.checkpoint), args.trust_remote_code
    tokenizer, _ = load_tokenizer(name, trust_remote_code=trust)
    device = find_device(args.device)
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # as in arguments; checked with the prompt
    if args.prompt is None and not args.interactive:
        if sys.stdin.isatty():
            print(f"text to continue? ({'Ctrl-Z and Enter' if os.name == 'nt' else 'Ctrl-D'} ends it)", file=sys.stderr)
        args.prompt = sys.stdin.read().removesuffix("\n")
    model = load_model(name, dtype=args.dtype, device=device, trust_remote_code=trust).eval()
    if args.interactive:
        interact(model, tokenizer, params)
        return
    prompt_ids = encode_prompt(tokenizer, args.prompt, model.config)
    for i in range(args.n):
        if args.n > 1:
            print(f"--- {i + 1}")
        print(args.prompt, end="", flush=True)
        write(model, tokenizer, prompt_ids, dataclasses.replace(params, seed=params.seed + i))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; see `common.cli.run_command`."""
    return run_command(_sample, arguments, on_interrupt="stopped")


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # the libraries' warnings; the checks of the commands report what matters
    sys.exit(main())
