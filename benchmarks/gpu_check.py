"""The first minutes on a new GPU: does it compute the right losses, how fast is it, and does everything work?

    python -m benchmarks.gpu_check --out runs/gpu_check          # 124M; at most 8 minutes, no network
    python -m benchmarks.gpu_check --out runs/gpu_check          # again: continues with the parts that are missing

    machine      versions, driver, the attention kernel that torch picks, the fastest matmul
    steps        this model, transformers' GPT-2 and benchmarks/plain_gpt2.py, eager and compiled: 20 losses from the
                 same weights on the same data; tokens/s in turns; peak memory, and what the plan says
    train        train.py: tokens/s; the same run killed and resumed, and how far its losses are from the first one's
    hellaswag    10,042 items as long as HellaSwag's, scored twice: the first pass has new shapes
    attention    flash against cuDNN and the other kernels

Each part is a process with a time limit of its own, so a failure costs only itself. A part writes OUT/PART.json as it
goes; the report is OUT/gpu_check.md, and all numbers are in OUT/gpu_check.json.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from common.cli import prepare_process

if __name__ == "__main__":
    prepare_process()  # before torch: its allocator is set as in train.py

import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import harness, train_step
from common.files import write_json
from common.metrics import read_metrics
from data.loader import Batch, WindowLoader
from data.manifest import open_split
from data.prepare import prepare_sample_if_missing
from eval.scoring import Request, loglikelihoods
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from training.config import BatchConfig
from training.estimate import Plan, find_hardware

CANDIDATES = ("ours", "transformers", "plain")
NUM_LOSSES = 20
RESUME_STEPS, SAVE_EVERY, ACCUMULATION = 24, 4, 4  # of train.py
Results = dict[str, Any]
Save = Callable[[Results], None]


def main() -> None:
    """Run the parts that are missing, one after the other, and write the report."""
    if sys.argv[1:2] == ["--part"]:
        run_part(sys.argv[2], argparse.Namespace(**json.loads(sys.argv[3])))
        return
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    prepare_sample_if_missing(args.out / "shards")
    for name in args.parts:
        results = read_part(args.out, name)
        left = end - time.monotonic()
        if results.get("complete") and results["settings"] == settings_of(args):
            print(f"{name:<10} is there already")
        elif left < min(10, PARTS[name][1]):
            print(f"{name:<10} no time left: run the same command again")
        else:
            print(f"{name:<10} {start_part(name, args, min(left, PARTS[name][1]))}", flush=True)
    parts = {name: read_part(args.out, name) for name in PARTS}
    write_json(args.out / "gpu_check.json", parts)
    (args.out / "gpu_check.md").write_text(report(parts), encoding="utf-8")
    print(f"\n{report(parts)}\n\nreport     {args.out / 'gpu_check.md'}")


def parse_args() -> argparse.Namespace:
    """Return the arguments, with the model's shape as `layers`, `heads` and `width`."""
    from modeling_gpt2repro.configuration_gpt2repro import SIZES

    sizes = {"tiny": (2, 2, 64), **SIZES}  # "tiny" is for trying this program
    parser = harness.make_parser(__doc__, rounds=3)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"), help="folder (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS], help="(default: all)")
    parser.add_argument("--minutes", type=float, default=8, help="time for all parts (default: %(default)s)")
    parser.add_argument("--size", choices=sizes, default="124M")
    parser.add_argument("--batch", type=int, help="sequences per micro-batch (default: by the GPU's memory, up to 64)")
    parser.add_argument("--seq_len", type=int, default=1024, help="tokens per sequence")
    parser.add_argument("--steps", type=int, default=10, help="timed steps per turn (default: %(default)s)")
    parser.add_argument("--items", type=int, default=10042, help="items of the part hellaswag (default: %(default)s)")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True, help="torch.compile, too")
    args = parser.parse_args()
    args.layers, args.heads, args.width = sizes[args.size]
    return args


def settings_of(args: argparse.Namespace) -> Results:
    """Return what the numbers depend on; parts with other settings are repeated."""
    return {name: value for name, value in vars(args).items() if name not in ("out", "parts", "minutes")}


def read_part(out: Path, name: str) -> Results:
    """Return what a part has written, or an empty dictionary."""
    path = out / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def start_part(name: str, args: argparse.Namespace, limit: float) -> str:
    """Run a part in a fresh process, and end it with all that it started when its time is over. Return how it went."""
    settings = json.dumps(settings_of(args) | {"out": str(args.out)})
    start = time.monotonic()
    with (args.out / f"{name}.log").open("w") as log:
        command = [sys.executable, "-m", "benchmarks.gpu_check", "--part", name, settings]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit)
        except BaseException as error:  # the time is over, or Ctrl-C
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return f"stopped after {limit:.0f} s; OUT/{name}.json has what was complete"
    return f"{f'failed, see {log.name}' if code else 'done'} ({time.monotonic() - start:.0f} s)"


def run_part(name: str, args: argparse.Namespace) -> None:
    """Run a part in this process. Whenever it has a result, OUT/PART.json is written."""
    args.out, args.device = Path(args.out), harness.pick_device()
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "device")}
    torch.set_float32_matmul_precision("high")
    if args.batch is None:  # transformers' GPT-2, not compiled, takes 1.5 GB per sequence of 1,024 tokens
        memory = torch.cuda.mem_get_info()[1] if args.device.type == "cuda" else 4e9
        args.batch = min(64, 2 ** int(memory / 1.2e9).bit_length() // 2)
    is_bf16 = args.device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    args.dtype = torch.bfloat16 if is_bf16 else torch.float16
    start = time.monotonic()

    def save(results: Results, complete: bool = False) -> None:
        seconds = time.monotonic() - start
        write_json(
            args.out / f"{name}.json", results | {"complete": complete, "seconds": seconds, "settings": settings}
        )

    save(PARTS[name][0](args, save), complete=True)


# ----------------------------------------------------------------------------------------------------------
# The parts.


def check_machine(args: argparse.Namespace, save: Save) -> Results:
    """Versions, driver, memory, torch's choice of attention kernel, and the fastest matmul."""
    results: Results = {"machine": harness.machine_name(), "dtype": str(args.dtype)}
    results |= {package: version(package) for package in ("transformers", "accelerate")}
    if args.device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        results["capability"], results["memory_gb"] = (
            f"{properties.major}.{properties.minor}",
            properties.total_memory / 1e9,
        )
        results["cuda"], results["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
        if shutil.which("nvidia-smi"):
            query = "--query-gpu=driver_version,power.limit,clocks.max.sm"
            command = ["nvidia-smi", query, "--format=csv,noheader"]
            results["driver, power limit, clock"] = subprocess.run(
                command, capture_output=True, text=True
            ).stdout.strip()
    save(results)
    q, k, v = attention_inputs(args)
    results["attention kernel"] = SDPBackend(torch._fused_sdp_choice(q, k, v, is_causal=True)).name
    turn = argparse.Namespace(**vars(args) | {"dtype": "bf16" if args.dtype == torch.bfloat16 else "fp32"})
    results["matmul TFLOP/s"] = train_step.matmul_ceiling(turn, args.device) / 1e12
    return results


class Candidate:
    """A model with an optimizer, from the same weights as the others."""

    def __init__(self, args: argparse.Namespace, name: str, is_compiled: bool, start: GPT2ReproForCausalLM) -> None:
        self.args = args
        self.model, self.compute_loss = train_step.build(argparse.Namespace(**vars(args) | {"candidate": name}))
        if name == "plain":
            weights = start.transformer.state_dict()
            padding = len(self.model.state_dict()["wte.weight"]) - start.config.vocab_size
            weights["wte.weight"] = F.pad(weights["wte.weight"], (0, 0, 0, padding))
        else:
            weights = (start.to_gpt2() if name == "transformers" else start).state_dict()
        self.model.load_state_dict(weights)
        self.model.to(args.device).train()
        self.called = self.model
        if is_compiled:  # as train.py does
            self.called = torch.compile(self.model, dynamic=False)  # type: ignore[assignment]  # a module, too
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, betas=(0.9, 0.95), fused=True)
        self.scaler = torch.amp.GradScaler(args.device.type, enabled=args.dtype == torch.float16)

    def step(self, batch: Batch) -> torch.Tensor:
        """Take an optimizer step and return the loss before it, on the device."""
        inputs, targets, _ = batch.to(self.args.device)
        with torch.autocast(self.args.device.type, self.args.dtype):
            loss = self.compute_loss(self.called, inputs, targets)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss.detach()

    def turn(self, batches: list[Batch]) -> float:
        """Return tokens/s over all steps but the first, which creates the optimizer's state. Drop the state at the end."""
        self.step(batches[0])

        def steps() -> None:
            for batch in batches[1:]:
                self.step(batch)

        seconds = harness.timed(steps, self.args.device)[1]
        self.optimizer.state.clear()
        return (len(batches) - 1) * batches[0].inputs.numel() / seconds


def check_steps(args: argparse.Namespace, save: Save) -> Results:
    """Losses from the same weights on the same data, then tokens/s in turns."""
    torch.manual_seed(0)
    shape = {"n_layer": args.layers, "n_head": args.heads, "n_embd": args.width}
    start = GPT2ReproForCausalLM(GPT2ReproConfig(**shape, n_positions=max(1024, args.seq_len)))
    plan = make_plan(args, cast(GPT2ReproConfig, start.config))
    loader = WindowLoader(
        [open_split(args.out / "shards", "train")], seq_len=args.seq_len, batch_size=args.batch, seed=0
    )
    batches = [loader.batch(step) for step in range(max(NUM_LOSSES, args.steps + 1))]
    rows: dict[str, Results] = {}
    estimate = plan.estimate_memory(args.batch)
    results = {"batch": args.batch, "plan_gb": (estimate.total - estimate.base) / 1e9, "candidates": rows}
    candidates: dict[str, Candidate] = {}
    for mode in ("eager", "compiled") if args.compiled else ("eager",):
        for name in CANDIDATES:
            row = rows[f"{name} {mode}"] = {}
            try:
                before = reset_peak(args.device)
                candidate = Candidate(args, name, mode == "compiled", start)
                losses = [candidate.step(batch) for batch in batches[:NUM_LOSSES]]
                row["losses"] = torch.stack(losses).tolist()
                if args.device.type == "cuda":
                    row["peak_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9
                candidate.optimizer.state.clear()
                candidates[f"{name} {mode}"] = candidate
            except Exception as error:  # out of memory, no compiler: the others are still worth their time
                row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            save(results)
    for _ in range(args.rounds):
        for key, candidate in candidates.items():
            speed = candidate.turn(batches[: args.steps + 1])
            rows[key].setdefault("tokens_per_s", []).append(speed)
            rows[key].setdefault("mfu", []).append(speed * plan.flops_per_token / plan.hardware.peak_flops)
            reset_peak(args.device)
            save(results)
    return results | {"peak": f"{plan.hardware.peak_flops / 1e12:,.3g} TFLOP/s ({plan.hardware.peak_source})"}


def make_plan(args: argparse.Namespace, shape: GPT2ReproConfig) -> Plan:
    """Return train.py's plan for steps of one micro-batch."""
    precision = "bf16" if args.dtype == torch.bfloat16 else "fp16"
    batch = BatchConfig(tokens_per_step=args.batch * args.seq_len, seq_len=args.seq_len, micro_batch_size=args.batch)
    accelerator = Accelerator(mixed_precision=precision, cpu=args.device.type == "cpu")
    return Plan(shape=shape, batch=batch, max_steps=1, hardware=find_hardware(accelerator))


def reset_peak(device: torch.device) -> int:
    """Give cached memory back and start a new peak. Return the bytes that are allocated."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def check_training(args: argparse.Namespace, save: Save) -> Results:
    """Run train.py to its end; then once more, killed after a checkpoint and resumed."""
    settings = {
        "config": "recipes/gpt2_124m.yaml",
        **{"model.n_layer": args.layers, "model.n_head": args.heads, "model.n_embd": args.width},
        **{"data.path": args.out / "shards", "data.prepare_sample": "true"},
        **{"batch.micro_batch_size": args.batch, "batch.seq_len": args.seq_len},
        "batch.tokens_per_step": ACCUMULATION * args.batch * args.seq_len,
        **{"max_steps": RESUME_STEPS, "save_every": SAVE_EVERY, "eval_every": 10**6, "optim.warmup_steps": 4},
        **{"eval.val_tokens": args.batch * args.seq_len, "eval.hellaswag": "null", "eval.prompts": "[]"},
        **{"compile": str(args.compiled).lower(), "trackers": "[]"},
    }
    command = [
        sys.executable,
        "train.py",
        *(word for key, value in settings.items() for word in (f"--{key}", str(value))),
    ]

    def start(run: Path, *more: str) -> subprocess.Popen:
        print(f"\n{run.name}", *more, flush=True)
        return subprocess.Popen([*command, "--output_dir", str(run), *more])

    undisturbed, killed = args.out / "train_undisturbed", args.out / "train_killed"
    for run in (undisturbed, killed):
        shutil.rmtree(run, ignore_errors=True)
    code, seconds = harness.timed(start(undisturbed).wait, torch.device("cpu"))
    results: Results = {"code": code, "undisturbed_s": seconds}
    milliseconds = [record["ms"] for record in read_metrics(undisturbed / "metrics.jsonl") if "ms" in record]
    if milliseconds:
        tokens = ACCUMULATION * args.batch * args.seq_len
        results["tokens_per_s"] = 1000 * tokens / statistics.median(milliseconds[len(milliseconds) // 2 :])
    save(results)
    process = start(killed)
    while process.poll() is None and not [*killed.glob("checkpoints/step_*")]:
        time.sleep(0.02)
    process.kill()
    results["killed"] = process.wait() < 0  # not if it ended before
    results["resume_code"], results["resume_s"] = harness.timed(
        start(killed, "--resume", "auto").wait, torch.device("cpu")
    )
    first, second = (
        {record["step"]: record["loss"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record}
        for run in (undisturbed, killed)
    )
    differences = {step: abs(first[step] - second[step]) for step in first if step in second}
    return results | {
        "steps_in_both": len(differences),
        "largest_difference": max(differences.values(), default=None),
        "first_different_step": next((step for step, value in differences.items() if value), None),
    }


def check_hellaswag(args: argparse.Namespace, save: Save) -> Results:
    """Score items of HellaSwag's lengths with random tokens, twice."""
    rng = random.Random(0)
    tokens = [rng.randrange(50257) for _ in range(1000)]
    requests = [
        Request(tokens[: rng.randint(15, 105)], [tokens[: rng.randint(10, 40)] for _ in range(4)])
        for _ in range(args.items)
    ]
    shape = {"n_layer": args.layers, "n_head": args.heads, "n_embd": args.width}
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**shape)).to(args.device)
    shapes = set()
    model.transformer.wte.register_forward_pre_hook(lambda _, arguments: shapes.add(arguments[0].shape))
    results: Results = {"items": args.items}
    for number in ("first", "second"):
        with torch.autocast(args.device.type, args.dtype):
            score = partial(loglikelihoods, model, requests)
            results[f"{number}_pass_s"] = harness.timed(score, args.device)[1]
        results["shapes"] = len(shapes)
        save(results)
    return results


def attention_inputs(args: argparse.Namespace) -> list[torch.Tensor]:
    """Return query, key and value [B, H, T, D/H] of one block."""
    shape = (args.batch, args.heads, args.seq_len, args.width // args.heads)
    return [torch.randn(shape, device=args.device, dtype=args.dtype, requires_grad=True) for _ in range(3)]


def check_attention(args: argparse.Namespace, save: Save) -> Results:
    """Time forward and backward pass of one block's attention with each of torch's kernels."""
    q, k, v = attention_inputs(args)
    times: dict[str, list[float] | str] = {}
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]

    def forward_and_backward() -> None:
        for _ in range(args.steps):
            F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    for kernel in kernels:
        try:
            with sdpa_kernel(kernel):
                forward_and_backward()
                seconds = [harness.timed(forward_and_backward, args.device)[1] for _ in range(args.rounds)]
            times[kernel.name] = [1000 * value / args.steps for value in seconds]
        except RuntimeError as error:  # not for this device, dtype or shape
            times[kernel.name] = str(error).splitlines()[0][:200]
        save({"ms": times})
    return {"ms": times}


PARTS: dict[str, tuple[Callable[[argparse.Namespace, Save], Results], float]] = {  # with the limit in seconds
    "machine": (check_machine, 60),
    "steps": (check_steps, 300),
    "train": (check_training, 240),
    "hellaswag": (check_hellaswag, 90),
    "attention": (check_attention, 60),
}


# ----------------------------------------------------------------------------------------------------------
# The report.


def report(parts: dict[str, Results]) -> str:
    """Return the results of all parts as Markdown."""
    sections = []
    for name, results in parts.items():
        state = "" if results.get("complete") else ": incomplete" if results else ": not run"
        sections.append(f"## {name}{state}")
        if name == "steps" and results:
            sections.append(steps_table(results))
        elif results:
            hidden = ("complete", "seconds", "settings")
            rows = [(key, rounded(value)) for key, value in results.items() if key not in hidden]
            sections.append(harness.table(("", ""), rows))
    return "\n\n".join(sections)


def steps_table(results: Results) -> str:
    """Return the table of the part `steps`. Losses are compared with those of our model without torch.compile."""
    reference = results["candidates"].get("ours eager", {}).get("losses")
    rows = []
    for name, row in results["candidates"].items():
        losses, cells = row.get("losses"), [row.get("error", "-")] * 3
        if losses:
            cells = [f"{losses[0]:.4f}", f"{losses[-1]:.4f}", "-"]
        if losses and reference:
            cells[2] = f"{max(abs(a - b) for a, b in zip(losses, reference, strict=True)):.4f}"
        if "mfu" in row:
            cells += [harness.with_range(row["tokens_per_s"], ",.0f"), harness.with_range(row["mfu"], ".3f")]
        rows.append([name, *cells, *["-"] * (5 - len(cells)), rounded(row.get("peak_gb", "-"))])
    columns = ("candidate", "first loss", f"loss {NUM_LOSSES}", "largest difference to ours eager", "tokens/s", "MFU")
    table = harness.table((*columns, "peak GB"), rows)
    return (
        f"{results['batch']} sequences per step; the plan says {results['plan_gb']:.2f} GB for ours in train.py; peak "
        f"{results.get('peak', '?')}\n\n{table}"
    )


def rounded(value: object) -> str:
    """Return a result as text."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {rounded(item)}" for key, item in value.items())
    if isinstance(value, list):
        return harness.with_range(value, ".3f")
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
