"""
Times greedy decoding with a cache: ours beside transformers' GPT-2 with the same weights.

    python benchmarks/generate.py                       # 124M, batches of 1 and 16, bf16
    python benchmarks/generate.py --static              # a compiled static cache instead of a growing one

Both models are in one process and take turns, `--rounds` times; the texts must be the same, or the program says how
many are not (in bf16 two orders of summation may part ways; in fp32 they must not). Prints a Markdown table.
"""

import argparse
import contextlib
import platform
import statistics
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.configuration_gpt2repro import SIZES


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="texts at a time")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to add to each")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--static", action="store_true", help="static cache, decoding compiled")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    config = GPT2ReproConfig.from_size(args.size)
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd))
    theirs = theirs.to(device, dtype).eval()
    models = {"ours": GPT2ReproForCausalLM.from_gpt2(theirs).eval(), "transformers": theirs}

    cache = "compiled static" if args.static else "dynamic"
    print(
        f"{args.size}, {args.prompt} + {args.new} tokens, {args.dtype}, {cache} cache; "
        f"{torch.cuda.get_device_name() if device == 'cuda' else cpu_name()}, torch {torch.__version__}, "
        f"Python {platform.python_version()}; median of {args.rounds} rounds (lowest to highest)\n\n"
        "| batch | ours, tokens/s | transformers, tokens/s | ours / transformers | different texts |\n"
        "|---|---|---|---|---|"
    )
    for batch in args.batch:
        prompts = torch.randint(0, 50257, (batch, args.prompt), device=device)
        speeds, texts = {name: [] for name in models}, {}
        for number in range(args.rounds + 1):  # the first is the warm-up
            for name, model in models.items():
                texts[name], seconds = decode(model, prompts, args)
                if number:
                    speeds[name].append(batch * args.new / seconds)
        ratios = [mine / other for mine, other in zip(*speeds.values(), strict=True)]
        cells = [
            str(batch),
            *(f"{statistics.median(s):,.1f} ({min(s):,.1f} to {max(s):,.1f})" for s in speeds.values()),
            f"{statistics.median(ratios):.2f}",
            f"{(texts['ours'] != texts['transformers']).any(dim=1).sum().item()} of {batch}",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)


def decode(model, prompts, args):
    """The texts [B, prompt + new], and the seconds they took."""
    from transformers import CompileConfig

    settings = {}
    if args.static:
        compile_config = CompileConfig(fullgraph=True, mode=None)
        compile_config._compile_all_devices = True  # left alone, generate() compiles on GPUs only
        settings = {"cache_implementation": "static", "compile_config": compile_config}
    synchronize(prompts)
    start = time.perf_counter()
    texts = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=args.new,
        min_new_tokens=args.new,
        do_sample=False,
        pad_token_id=50256,
        **settings,
    )
    synchronize(prompts)
    return texts, time.perf_counter() - start


def synchronize(tensor):
    if tensor.is_cuda:
        torch.cuda.synchronize()


def cpu_name():
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{torch.get_num_threads()} cores of {name}"


if __name__ == "__main__":
    main()
