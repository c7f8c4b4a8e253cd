"""
Times one optimizer step (forward, backward, AdamW) of GPT-2: ours beside transformers' and any lecture-like script.

    python benchmarks/train_step.py                                  # 124M, 4 x 1024 tokens, bf16, eager and compiled
    python benchmarks/train_step.py --script build-nanogpt/train_gpt2.py --no-compiled
    python benchmarks/train_step.py --candidates ours ours-50304     # what a 50,257-row vocabulary costs
    python benchmarks/train_step.py --candidates ours --profile      # where one step's time goes

Every turn is a fresh process (so that peak memory is its own), and the candidates take turns, `--rounds` times,
so that a slow minute of the machine falls on all of them. Each turn also measures the machine's ceiling: the best
of a few matmuls of the model's own and of square shapes, in the same dtype. Results go to standard output as a table
and, with --json, to a file.

A script is read, not run: its imports, classes and functions are taken, and `GPT(GPTConfig(...))` is built from them
with the lecture's 50,304-row vocabulary; its forward takes (tokens, targets) and returns (logits, loss).
"""

import argparse
import ast
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

import torch

# Layers, heads, width; not imported from the model's package, whose imports would count as a script's memory.
SHAPES = {
    "tiny": (2, 2, 128),  # for trying this program
    "124M": (12, 12, 768),
    "350M": (24, 16, 1024),
    "774M": (36, 20, 1280),
    "1558M": (48, 25, 1600),
}
WARM_UP_STEPS = 3  # the first two allocate, and make the optimizer's state


def main():
    args = parse_args()
    if args.turn:
        print(json.dumps(measure_turn(args.turn, args)))
        return
    candidates = args.candidates or ["ours", "transformers", *(f"script:{path}" for path in args.script)]
    modes = (["eager"] if args.eager else []) + (["compiled"] if args.compiled else [])
    results = {}
    for number in range(args.rounds):
        for mode in modes:
            for candidate in candidates:
                turn = run_turn(candidate, mode)
                results.setdefault((candidate, mode), []).append(turn)
                print(
                    f"round {number + 1}  {candidate:<14} {mode:<9} {turn['tokens_per_second']:>9,.0f} tok/s  "
                    f"{turn['peak_gb']:5.2f} GB  ceiling {turn['ceiling_tflops']:.2f} TFLOP/s",
                    flush=True,
                )
                if turn["profile"]:
                    print(turn["profile"])
    print(report(results, args))
    if args.json:
        rows = [{"candidate": c, "mode": m, "turns": turns} for (c, m), turns in results.items()]
        Path(args.json).write_text(json.dumps({"arguments": vars(args), "results": rows}, indent=2) + "\n")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="124M")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--seq_len", type=int, default=1024, help="tokens a sequence")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the matmuls (autocast)")
    parser.add_argument("--candidates", nargs="+", help="ours, ours-50304, transformers, script:PATH")
    parser.add_argument("--script", nargs="+", default=[], help="files that define GPT and GPTConfig")
    parser.add_argument("--eager", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--steps", type=int, default=5, help="timed steps a turn; the median counts")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each candidate")
    parser.add_argument("--profile", action="store_true", help="also print the profile of one step")
    parser.add_argument("--json", help="write all turns to this file")
    parser.add_argument("--turn", help=argparse.SUPPRESS)  # CANDIDATE@MODE: what the fresh process measures
    args = parser.parse_args()
    for script in args.script:
        if not Path(script).is_file():
            parser.error(f"--script {script}: no such file")
    return args


def run_turn(candidate, mode):
    command = [sys.executable, __file__, *sys.argv[1:], "--turn", f"{candidate}@{mode}"]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{candidate} {mode} failed:\n{process.stderr[-3000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def report(results, args):
    """A Markdown table: medians over the rounds, and ratios within a round."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    lines = [
        "",
        f"{args.size}, {args.batch} x {args.seq_len} tokens, {args.dtype}, AdamW; {device}, "
        f"torch {torch.__version__}, Python {platform.python_version()}; "
        f"median of {args.rounds} rounds (lowest to highest)",
        "",
        "| candidate | mode | tokens/s | share of ceiling | peak GB | tokens/s over transformers' | "
        "peak over transformers' eager |",
        "|---|---|---|---|---|---|---|",
    ]
    for (candidate, mode), turns in results.items():
        speeds = [turn["tokens_per_second"] for turn in turns]
        row = [
            candidate,
            mode,
            f"{statistics.median(speeds):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f})",
            f"{statistics.median(turn['share_of_ceiling'] for turn in turns):.2f}",
            f"{statistics.median(turn['peak_gb'] for turn in turns):.2f}",
        ]
        for reference, key in (
            (results.get(("transformers", mode)), "tokens_per_second"),
            (results.get(("transformers", "eager")), "peak_gb"),
        ):
            if reference is None:
                row.append("-")
            else:
                ratios = [turn[key] / other[key] for turn, other in zip(turns, reference, strict=True)]
                row.append(f"{statistics.median(ratios):.2f}")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def cpu_name():
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{torch.get_num_threads()} cores of {name}"


# ----------------------------------------------------------------------------------------------------------
# One turn, in a process of its own.


def measure_turn(turn, args):
    candidate, mode = turn.rsplit("@", 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model, loss_of = build(candidate, args)
    model.to(device).train()
    num_parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, 50257, (args.batch, args.seq_len + 1), device=device)
    forward = torch.compile(loss_of) if mode == "compiled" else loss_of

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
            loss = forward(model, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(WARM_UP_STEPS):
        step()
    # Memory before the ceiling is measured: its matrices are not the model's. Compiling is done by then, but its
    # memory counts, as it does for the user.
    seconds = sorted(timed(step, device) for _ in range(args.steps))[args.steps // 2]
    peak_gb = peak_memory_gb(device)
    profile = profile_of(step, device) if args.profile else None
    ceiling = matmul_ceiling(args, device)
    layers, _, width = SHAPES[args.size]
    num_tokens = args.batch * args.seq_len
    # 6 FLOPs a parameter and token, without the position embedding (looked up) and counting 50,257 rows of the token
    # embedding for everybody; attention's two T x T matmuls, not halved for causality (PaLM paper, appendix B).
    matmul_parameters = 12 * layers * width**2 + 50257 * width
    flops = num_tokens * (6 * matmul_parameters + 12 * layers * width * args.seq_len)
    return {
        "tokens_per_second": num_tokens / seconds,
        "seconds_per_step": seconds,
        "share_of_ceiling": flops / seconds / ceiling,
        "ceiling_tflops": ceiling / 1e12,
        "peak_gb": peak_gb,
        "num_parameters": num_parameters,
        "profile": profile,
    }


def build(candidate, args):
    """The model, and a function (model, tokens, targets) -> loss, each [B, T]."""
    layers, heads, width = SHAPES[args.size]
    shape = {"n_layer": layers, "n_head": heads, "n_embd": width}
    positions = max(1024, args.seq_len)
    if candidate.startswith("ours"):
        from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM

        vocab_size = int(candidate.partition("-")[2] or 50257)
        model = GPT2ReproForCausalLM(GPT2ReproConfig(**shape, n_positions=positions, vocab_size=vocab_size))
        return model, lambda model, tokens, targets: model(tokens, shift_labels=targets).loss
    if candidate == "transformers":
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(**shape, n_positions=positions, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        model = GPT2LMHeadModel._from_config(config, attn_implementation="sdpa")
        # Its loss shifts labels itself; all but the last target are at hand.
        return model, lambda model, tokens, targets: model(tokens, labels=tokens, use_cache=False).loss
    if candidate.startswith("script:"):
        path = candidate.partition(":")[2]
        names = definitions_of(path)
        if not {"GPT", "GPTConfig"} <= names.keys():
            raise SystemExit(f"{path} does not define GPT and GPTConfig")
        model = names["GPT"](names["GPTConfig"](**shape, block_size=positions, vocab_size=50304))
        return model, lambda model, tokens, targets: model(tokens, targets)[1]
    raise SystemExit(f"no candidate {candidate!r}: ours, ours-50304, transformers or script:PATH")


def definitions_of(path):
    """A script's imports, classes and functions, without running the rest of it."""
    tree = ast.parse(Path(path).read_text(), filename=str(path))
    module = types.ModuleType("lecture_script")
    sys.modules["lecture_script"] = module  # dataclasses and the compiler look it up
    names = vars(module)
    sys.path.insert(0, str(Path(path).resolve().parent))
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            # A tokenizer or a neighbouring script that the model itself does not use may be absent.
            with contextlib.suppress(ImportError):
                exec(compile(ast.Module([node], []), str(path), "exec"), names)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            exec(compile(ast.Module([node], []), str(path), "exec"), names)
    return names


def timed(function, device):
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory_gb(device):
    """On a GPU what torch allocated; on a CPU the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def matmul_ceiling(args, device):
    """FLOP/s of the fastest of a few matmuls: the model's own shapes, and squares."""
    width, rows = SHAPES[args.size][2], args.batch * args.seq_len
    square = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    best = 0.0
    for m, k, n in ((rows, width, 3 * width), (rows, width, 4 * width), (rows, 4 * width, width), (square,) * 3):
        a = torch.randn(m, k, device=device).to(dtype)
        b = torch.randn(n, k, device=device).to(dtype)
        out = torch.empty(m, n, device=device, dtype=dtype)
        seconds = min(timed(lambda a=a, b=b, out=out: torch.mm(a, b.T, out=out), device) for _ in range(10))
        best = max(best, 2 * m * k * n / seconds)
    return best


def profile_of(step, device):
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        synchronize(device)
    return profiler.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=25)


if __name__ == "__main__":
    main()
