"""Time greedy decoding with a cache: this model and transformers' GPT-2 with the same weights.

    python -m benchmarks.generate                       # 124M, batches of 1 and 16, bf16

Both models are in one process and take turns. The last column counts texts that differ. In fp32 all must be equal; in
bf16 a different order of summation can change a token. Prints a Markdown table.
"""

import argparse
from functools import partial
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from benchmarks import harness
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.configuration_gpt2repro import SIZES

COLUMNS = ("batch", "ours, tokens/s", "transformers, tokens/s", "ours / transformers", "different texts")


def main() -> None:
    """Parse the arguments, measure and print the table."""
    parser = harness.make_parser(__doc__, rounds=5)
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="batch sizes")
    parser.add_argument("--prompt", type=int, default=64, help="tokens in each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate after each prompt")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    args = parser.parse_args()

    logging.set_verbosity_error()
    device = harness.pick_device()
    torch.manual_seed(0)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    config = GPT2ReproConfig.from_size(args.size)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd))
    torch.nn.Module.to(gpt2, device, dtype)
    ours = GPT2ReproForCausalLM.from_gpt2(gpt2.eval()).eval()

    rows = []
    for batch in args.batch:
        prompts = torch.randint(0, 50257, (batch, args.prompt), device=device)
        candidates = {
            "ours": partial(decode, ours, prompts, args),
            "transformers": partial(decode, gpt2, prompts, args),
        }
        results = harness.take_turns(candidates, args.rounds + 1, lambda result: f"{result[1]:,.1f} tokens/s")
        speeds = [[speed for _, speed in rounds[1:]] for rounds in results.values()]  # the first round is the warm-up
        texts = [rounds[-1][0] for rounds in results.values()]
        num_different = (texts[0] != texts[1]).any(dim=1).sum().item()
        ranges = (harness.with_range(speed, ",.1f") for speed in speeds)
        rows.append([batch, *ranges, harness.median_ratio(*speeds), f"{num_different} of {batch}"])
    title = f"{args.size}, {args.prompt} + {args.new} tokens, {args.dtype}"
    harness.print_report(title, args.rounds, COLUMNS, rows)


def decode(model: Any, prompts: torch.Tensor, args: argparse.Namespace) -> tuple[torch.Tensor, float]:
    """Continue the prompts [B, T]. Return the texts [B, T + args.new] and the speed in tokens/s."""
    settings = {"max_new_tokens": args.new, "min_new_tokens": args.new, "do_sample": False}
    mask = torch.ones_like(prompts)
    decode_prompts = partial(model.generate, prompts, attention_mask=mask, pad_token_id=50256, **settings)
    texts, seconds = harness.timed(decode_prompts, prompts.device)
    return texts, len(prompts) * args.new / seconds


if __name__ == "__main__":
    main()
