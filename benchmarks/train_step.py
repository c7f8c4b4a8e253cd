"""Time one optimizer step (forward, backward, AdamW) of GPT-2: this model, transformers', and any lecture-like script.

    python -m benchmarks.train_step                                  # 124M, 4 x 1024 tokens, bf16, eager and compiled
    python -m benchmarks.train_step --no-compiled --candidates ours transformers script:build-nanogpt/train_gpt2.py
    python -m benchmarks.train_step --candidates ours ours-50304 plain      # what a 50,257-row vocabulary costs

Every turn is a fresh process, so that peak memory is its own. Each turn also measures the machine's ceiling: the best
of square matmuls in the same dtype, as train.py measures the peak of a device. Prints a Markdown table.

"plain" is the model of benchmarks/plain_gpt2.py. A script is not run: its imports, classes and functions are taken, and
`GPT(GPTConfig(...))` is built from them with the lecture's 50,304-row vocabulary. Its forward takes (tokens, targets)
and returns (logits, loss).
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.plain_gpt2 import PlainGPT2

WARM_UP_STEPS = 3  # the first two allocate memory and create the optimizer's state
COLUMNS = (
    *("candidate", "mode", "tokens/s", "share of ceiling", "peak GB"),
    *("tokens/s over transformers'", "peak over transformers' eager"),
)
CANDIDATES = ("ours", "ours-50304", "transformers", "plain")
LossFunction = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def main() -> None:
    """Parse the arguments, measure and print the table; with --turn, measure one turn."""
    if sys.argv[1:2] == ["--turn"]:
        print(json.dumps(measure_turn(argparse.Namespace(**json.loads(sys.argv[2])))))
        return
    args = parse_args()
    modes = [mode for mode in ("eager", "compiled") if getattr(args, mode)]
    turns = {(name, mode): vars(args) | {"candidate": name, "mode": mode} for mode in modes for name in args.candidates}
    candidates = {" ".join(key): partial(run_turn, turn) for key, turn in turns.items()}
    results = harness.take_turns(candidates, args.rounds, describe)

    def values(name: str, mode: str, what: str) -> list[float]:
        return [result[what] for result in results.get(f"{name} {mode}", [])]

    rows = []
    for name, mode in turns:
        speeds, peaks = values(name, mode, "tokens_per_second"), values(name, mode, "peak_gb")
        rows.append(
            [
                name,
                mode,
                harness.with_range(speeds, ",.0f"),
                f"{statistics.median(values(name, mode, 'share_of_ceiling')):.2f}",
                f"{statistics.median(peaks):.2f}",
                harness.median_ratio(speeds, values("transformers", mode, "tokens_per_second")),
                harness.median_ratio(peaks, values("transformers", "eager", "peak_gb")),
            ]
        )
    title = f"{args.size}, {args.batch} x {args.seq_len} tokens, {args.dtype}, AdamW"
    harness.print_report(title, args.rounds, COLUMNS, rows)


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
    parser.add_argument(
        "--candidates",
        nargs="+",
        default=["ours", "transformers"],
        help="ours, ours-50304, transformers, plain, script:PATH of a file that defines GPT and GPTConfig",
    )
    parser.add_argument("--eager", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--steps", type=int, default=5, help="timed steps per turn; the median is reported")
    args = parser.parse_args()
    for candidate in args.candidates:  # before the turns, which take minutes
        name, _, path = candidate.partition(":")
        if candidate not in CANDIDATES and not (name == "script" and Path(path).is_file()):
            parser.error(f"candidate {candidate!r} must be {', '.join(CANDIDATES)} or script:PATH of a file")
    args.layers, args.heads, args.width = sizes[args.size]
    return args


def run_turn(turn: dict[str, Any]) -> dict[str, float]:
    """Measure a turn in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--turn", json.dumps(turn)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"error: {turn['candidate']} {turn['mode']} failed:\n{process.stderr[-3000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def describe(result: dict[str, float]) -> str:
    """Return a turn's results as text."""
    speed, peak, ceiling = result["tokens_per_second"], result["peak_gb"], result["ceiling_tflops"]
    return f"{speed:>9,.0f} tokens/s  {peak:5.2f} GB  ceiling {ceiling:.2f} TFLOP/s"


# ----------------------------------------------------------------------------------------------------------
# One turn, in a process of its own.


def measure_turn(turn: argparse.Namespace) -> dict[str, float]:
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
    from training.estimate import measure_matmul_flops  # here: it imports transformers

    ceiling = measure_matmul_flops(device, torch.bfloat16 if turn.dtype == "bf16" else torch.float32)
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
    }


def build(turn: argparse.Namespace) -> tuple[torch.nn.Module, LossFunction]:
    """Return the model, and a function (model, tokens [B, T], targets [B, T]) -> loss."""
    shape = {"n_layer": turn.layers, "n_head": turn.heads, "n_embd": turn.width}
    n_positions = max(1024, turn.seq_len)
    if turn.candidate.startswith("ours"):
        from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM

        vocab_size = int(turn.candidate.partition("-")[2] or 50257)
        ours = GPT2ReproForCausalLM(GPT2ReproConfig(**shape, n_positions=n_positions, vocab_size=vocab_size))
        return ours, lambda model, tokens, targets: model(tokens, shift_labels=targets).loss
    if turn.candidate == "transformers":
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(**shape, n_positions=n_positions, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        gpt2 = GPT2LMHeadModel._from_config(config, attn_implementation="sdpa")
        # With shift_labels, the loss does not shift the labels.
        return (
            gpt2,
            lambda model, tokens, targets: model(tokens, labels=targets, shift_labels=targets, use_cache=False).loss,
        )
    if turn.candidate == "plain":
        return PlainGPT2(**shape, n_positions=n_positions), lambda model, tokens, targets: model(tokens, targets)
    if turn.candidate.startswith("script:"):
        names = harness.load_definitions(turn.candidate.partition(":")[2])
        gpt = names["GPT"](names["GPTConfig"](**shape, block_size=n_positions, vocab_size=50304))
        return gpt, lambda model, tokens, targets: model(tokens, targets)[1]
    raise AssertionError(turn.candidate)  # parse_args has checked it


def peak_memory_gb(device: torch.device) -> float:
    """Return the GB that torch allocated on a GPU; on a CPU, the largest resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


if __name__ == "__main__":
    main()
