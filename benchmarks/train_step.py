"""
Time one optimizer step (forward, backward, AdamW) of GPT-2: this model, transformers', and any lecture-like script.

    python -m benchmarks.train_step                                  # 124M, 4 x 1024 tokens, bf16, eager and compiled
    python -m benchmarks.train_step --script build-nanogpt/train_gpt2.py --no-compiled
    python -m benchmarks.train_step --candidates ours ours-50304     # what a 50,257-row vocabulary costs
    python -m benchmarks.train_step --candidates ours --profile      # where one step's time goes

Every turn is a fresh process, so that peak memory is its own. Each turn also measures the machine's ceiling: the best
of a few matmuls of the model's shapes and of square shapes, in the same dtype. Prints a Markdown table.

A script is not run: its imports, classes and functions are taken, and `GPT(GPTConfig(...))` is built from them with
the lecture's 50,304-row vocabulary. Its forward takes (tokens, targets) and returns (logits, loss).
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness

WARM_UP_STEPS = 3  # the first two allocate memory and create the optimizer's state
COLUMNS = (
    *("candidate", "mode", "tokens/s", "share of ceiling", "peak GB"),
    *("tokens/s over transformers'", "peak over transformers' eager"),
)
LossFunction = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def main() -> None:
    """Parse the arguments, measure and print the table; with --turn, measure one turn."""
    if sys.argv[1:2] == ["--turn"]:
        print(json.dumps(measure_turn(argparse.Namespace(**json.loads(sys.argv[2])))))
        return
    args = parse_args()
    names = args.candidates or ["ours", "transformers", *(f"script:{path}" for path in args.script)]
    modes = (["eager"] if args.eager else []) + (["compiled"] if args.compiled else [])
    turns = {f"{name} {mode}": vars(args) | {"candidate": name, "mode": mode} for mode in modes for name in names}
    candidates = {key: lambda turn=turn: run_turn(turn) for key, turn in turns.items()}
    results = harness.take_turns(candidates, args.rounds, progress_line)

    def values(key: str, name: str) -> list[float] | None:
        return [result[name] for result in results[key]] if key in results else None

    rows = []
    for key, turn in turns.items():
        speeds, shares, peaks = (values(key, name) for name in ("tokens_per_second", "share_of_ceiling", "peak_gb"))
        rows.append(
            [
                turn["candidate"],
                turn["mode"],
                harness.with_range(speeds, ",.0f"),
                f"{statistics.median(shares):.2f}",
                f"{statistics.median(peaks):.2f}",
                harness.median_ratio(speeds, values(f"transformers {turn['mode']}", "tokens_per_second")),
                harness.median_ratio(peaks, values("transformers eager", "peak_gb")),
            ]
        )
    title = f"{args.size}, {args.batch} x {args.seq_len} tokens, {args.dtype}, AdamW"
    print(harness.report(title, args.rounds, COLUMNS, rows))


def parse_args() -> argparse.Namespace:
    """Return the arguments, and the model's shape as `layers`, `heads` and `width`."""
    # Imported here: a turn's peak memory must not include transformers if its candidate does not use it.
    from modeling_gpt2repro.configuration_gpt2repro import SIZES

    sizes = {"tiny": (2, 2, 128), **SIZES}  # "tiny" is for trying this program
    parser = harness.make_parser(__doc__, rounds=3)
    parser.add_argument("--size", choices=sizes, default="124M")
    parser.add_argument("--batch", type=int, default=4, help="sequences per step")
    parser.add_argument("--seq_len", type=int, default=1024, help="tokens per sequence")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="dtype of the matmuls (autocast)")
    parser.add_argument("--candidates", nargs="+", help="ours, ours-50304, transformers, script:PATH")
    parser.add_argument("--script", nargs="+", default=[], help="files that define GPT and GPTConfig")
    parser.add_argument("--eager", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--steps", type=int, default=5, help="timed steps per turn; the median is reported")
    parser.add_argument("--profile", action="store_true", help="also print the profile of one step")
    args = parser.parse_args()
    for script in args.script:
        if not Path(script).is_file():
            parser.error(f"--script {script}: file not found")
    args.layers, args.heads, args.width = sizes[args.size]
    return args


def run_turn(turn: dict[str, Any]) -> dict[str, Any]:
    """Measure a turn in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--turn", json.dumps(turn)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"error: {turn['candidate']} {turn['mode']} failed:\n{process.stderr[-3000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def progress_line(result: dict[str, Any]) -> str:
    """Return a turn's results as text, followed by its profile if there is one."""
    line = f"{result['tokens_per_second']:>9,.0f} tokens/s  {result['peak_gb']:5.2f} GB  "
    line += f"ceiling {result['ceiling_tflops']:.2f} TFLOP/s"
    return "\n".join(filter(None, (line, result["profile"])))


# ----------------------------------------------------------------------------------------------------------
# One turn, in a process of its own.


def measure_turn(turn: argparse.Namespace) -> dict[str, Any]:
    """Train for a few steps. Return speed, peak memory and the machine's ceiling."""
    device = harness.pick_device()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model, compute_loss = build(turn)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, 50257, (turn.batch, turn.seq_len + 1), device=device)
    forward = torch.compile(compute_loss) if turn.mode == "compiled" else compute_loss

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=turn.dtype == "bf16"):
            loss = forward(model, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(WARM_UP_STEPS):
        step()
    seconds = sorted(harness.timed(step, device)[1] for _ in range(turn.steps))[turn.steps // 2]
    # Read before the ceiling is measured, whose matrices are not the model's. The compiler's memory is included, as it
    # is for a user.
    peak_gb = peak_memory_gb(device)
    profile = profile_of(step, device) if turn.profile else None
    ceiling = matmul_ceiling(turn, device)
    num_tokens = turn.batch * turn.seq_len
    # 6 FLOPs per parameter and token, without the position embedding (looked up) and with 50,257 rows of the token
    # embedding for every candidate; attention's two T x T matmuls, not halved for causality (PaLM paper, appendix B).
    matmul_parameters = 12 * turn.layers * turn.width**2 + 50257 * turn.width
    flops = num_tokens * (6 * matmul_parameters + 12 * turn.layers * turn.width * turn.seq_len)
    return {
        "tokens_per_second": num_tokens / seconds,
        "share_of_ceiling": flops / seconds / ceiling,
        "ceiling_tflops": ceiling / 1e12,
        "peak_gb": peak_gb,
        "profile": profile,
    }


def build(turn: argparse.Namespace) -> tuple[torch.nn.Module, LossFunction]:
    """Return the model, and a function (model, tokens [B, T], targets [B, T]) -> loss."""
    shape = {"n_layer": turn.layers, "n_head": turn.heads, "n_embd": turn.width}
    n_positions = max(1024, turn.seq_len)
    if turn.candidate.startswith("ours"):
        from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM

        vocab_size = int(turn.candidate.partition("-")[2] or 50257)
        model = GPT2ReproForCausalLM(GPT2ReproConfig(**shape, n_positions=n_positions, vocab_size=vocab_size))
        return model, lambda model, tokens, targets: model(tokens, shift_labels=targets).loss
    if turn.candidate == "transformers":
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(**shape, n_positions=n_positions, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        model = GPT2LMHeadModel._from_config(config, attn_implementation="sdpa")
        # This loss shifts the labels itself, so it has one target less per sequence.
        return model, lambda model, tokens, targets: model(tokens, labels=tokens, use_cache=False).loss
    if turn.candidate.startswith("script:"):
        path = turn.candidate.partition(":")[2]
        names = harness.load_definitions(path)
        if not {"GPT", "GPTConfig"} <= names.keys():
            raise SystemExit(f"{path} does not define GPT and GPTConfig")
        model = names["GPT"](names["GPTConfig"](**shape, block_size=n_positions, vocab_size=50304))
        return model, lambda model, tokens, targets: model(tokens, targets)[1]
    raise SystemExit(f"unknown candidate {turn.candidate!r}: use ours, ours-50304, transformers or script:PATH")


def peak_memory_gb(device: torch.device) -> float:
    """Return the GB that torch allocated on a GPU; on a CPU, the largest resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def matmul_ceiling(turn: argparse.Namespace, device: torch.device) -> float:
    """Return the FLOP/s of the fastest of a few matmuls: the model's shapes, and squares."""
    width, rows = turn.width, turn.batch * turn.seq_len
    square = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if turn.dtype == "bf16" else torch.float32
    best = 0.0
    for m, k, n in ((rows, width, 3 * width), (rows, width, 4 * width), (rows, 4 * width, width), (square,) * 3):
        a = torch.randn(m, k, device=device).to(dtype)
        b = torch.randn(n, k, device=device).to(dtype)
        out = torch.empty(m, n, device=device, dtype=dtype)
        seconds = min(harness.timed(lambda a=a, b=b, out=out: torch.mm(a, b.T, out=out), device)[1] for _ in range(10))
        best = max(best, 2 * m * k * n / seconds)
    return best


def profile_of(step: Callable[[], None], device: torch.device) -> str:
    """Return the profiler's table of one step, sorted by the device's time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        harness.synchronize(device)
    return profiler.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=25)


if __name__ == "__main__":
    main()
