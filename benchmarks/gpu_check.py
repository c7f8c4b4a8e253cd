"""The first minutes on a new GPU: does it compute the right losses, how fast is it, and does everything work?

    python -m benchmarks.gpu_check --out runs/gpu_check          # 124M; at most 8 minutes, no network
    python -m benchmarks.gpu_check --out runs/gpu_check          # again: continues with the parts that are missing

    machine      versions, driver, the fastest matmul; attention: torch's choice, and each kernel's time
    steps        this model, transformers' GPT-2 and benchmarks/plain_gpt2.py, eager and compiled: 20 losses from the
                 same weights on the same data; tokens/s in turns; peak memory, and what train.py's plan says
    train        train.py: tokens/s; the same run killed and resumed, and how far its losses are from the first one's
    hellaswag    10,042 items as long as HellaSwag's, scored twice: the first pass has new shapes

Each part is a process with a time limit of its own, so a failure costs only itself. A part writes OUT/PART.json as it
goes; OUT/gpu_check.json has them all, and OUT/gpu_check.md is the report. "steps" takes one micro-batch per step.
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
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from common.cli import prepare_process

if __name__ == "__main__":
    prepare_process()  # before torch, whose allocator it sets as for train.py

import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import harness, train_step
from common import markdown
from common.errors import one_line
from common.files import read_json, write_json
from common.metrics import read_metrics
from data.loader import Batch, WindowLoader
from data.manifest import open_split
from data.prepare import prepare_sample_if_missing
from eval.scoring import Request, loglikelihoods
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.configuration_gpt2repro import SIZES
from training.config import BatchConfig
from training.estimate import Plan, find_hardware, measure_matmul_flops

NUM_LOSSES = 20
TRAIN_STEPS, SAVE_EVERY, ACCUMULATION = 24, 4, 4  # of train.py
KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
NOT_SETTINGS = ("out", "parts", "minutes")
Results = dict[str, Any]
Save = Callable[[Results], None]


def main() -> None:
    """Run the parts that are missing, one after the other, and write the report."""
    if sys.argv[1:2] == ["--part"]:
        run_part(sys.argv[2], argparse.Namespace(**json.loads(sys.argv[3])))
        return
    args = parse_args()
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    prepare_sample_if_missing(args.out / "shards")
    end = time.monotonic() + 60 * args.minutes
    for name in args.parts:
        results = read_json(args.out / f"{name}.json")
        limit = min(PARTS[name][1], end - time.monotonic())
        if results.get("complete") and results["settings"] == settings:
            print(f"{name:<10} is there already")
        elif limit < 10:
            print(f"{name:<10} no time left: run the same command again")
        else:
            print(f"{name:<10} {start_part(name, args.out, settings, limit)}", flush=True)
    parts = {name: read_json(args.out / f"{name}.json") for name in PARTS}
    write_json(args.out / "gpu_check.json", parts)
    text = report(parts)
    (args.out / "gpu_check.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")


def parse_args() -> argparse.Namespace:
    """Return the arguments, with the model's shape as `layers`, `heads` and `width`."""
    sizes = {"tiny": (2, 2, 64), **SIZES}  # "tiny" is for trying this program
    parser = harness.make_parser(__doc__, rounds=3)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"), help="folder (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS], help="(default: all)")
    parser.add_argument("--minutes", type=float, default=8, help="time for all parts (default: %(default)s)")
    parser.add_argument("--size", choices=sizes, default="124M")
    parser.add_argument("--batch", type=int, help="sequences per micro-batch (default: by the GPU's memory, up to 64)")
    parser.add_argument("--seq_len", type=int, default=1024, help="tokens per sequence")
    parser.add_argument("--steps", type=int, default=10, help="timed steps per turn (default: %(default)s)")
    parser.add_argument("--items", type=int, default=10042, help="of the part hellaswag (default: %(default)s)")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True, help="torch.compile, too")
    args = parser.parse_args()
    args.layers, args.heads, args.width = sizes[args.size]
    return args


def start_part(name: str, out: Path, settings: Results, limit: float) -> str:
    """Run a part in a fresh process. When its time is over, end it and all that it started. Return how it went."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--part", name, json.dumps(settings | {"out": str(out)})]
    start = time.monotonic()
    with (out / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s: {out / f'{name}.json'} has what was complete"
        finally:
            if process.poll() is None:  # also after Ctrl-C
                os.killpg(process.pid, signal.SIGKILL)
    return f"{f'failed, see {log.name}' if code else 'done'} ({time.monotonic() - start:.0f} s)"


def run_part(name: str, args: argparse.Namespace) -> None:
    """Run a part in this process. Whenever it has a result, OUT/PART.json is written."""
    settings = {key: value for key, value in vars(args).items() if key not in NOT_SETTINGS}
    args.out, args.device, is_bf16 = Path(args.out), harness.pick_device(), True
    if args.device.type == "cuda":
        is_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if args.batch is None:  # the plain models take about 1.2 GB per sequence of 1,024 tokens
        memory = torch.cuda.mem_get_info()[1] if args.device.type == "cuda" else 4e9
        args.batch = min(64, 2 ** (int(memory / 1.2e9).bit_length() - 1))
    args.dtype = torch.bfloat16 if is_bf16 else torch.float16
    torch.set_float32_matmul_precision("high")
    start = time.monotonic()

    def save(results: Results, complete: bool = False) -> None:
        state = {"complete": complete, "part_s": time.monotonic() - start, "settings": settings}
        write_json(args.out / f"{name}.json", results | state)

    save(PARTS[name][0](args, save), complete=True)


# ----------------------------------------------------------------------------------------------------------
# The parts.


def check_machine(args: argparse.Namespace, save: Save) -> Results:
    """Find versions, driver and memory, and time matmuls and attention (forward and backward pass of one block)."""
    results: Results = {"machine": harness.machine_name(), "dtype": str(args.dtype)}
    results |= {package: version(package) for package in ("transformers", "accelerate")}
    if args.device.type == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        results |= {"capability": f"{gpu.major}.{gpu.minor}", "memory GB": gpu.total_memory / 1e9}
        results |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
        results["driver, power limit, clock"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    results["matmul TFLOP/s"] = measure_matmul_flops(args.device, args.dtype) / 1e12
    shape = (args.batch, args.heads, args.seq_len, args.width // args.heads)
    q, k, v = (torch.randn(shape, device=args.device, dtype=args.dtype, requires_grad=True) for _ in range(3))
    results["torch's choice of attention"] = SDPBackend(torch._fused_sdp_choice(q, k, v, is_causal=True)).name
    rows = results["attention"] = {kernel.name: Results() for kernel in KERNELS}
    save(results)

    def attend() -> None:
        for _ in range(args.steps):
            F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    for kernel in KERNELS:
        try:
            with sdpa_kernel(kernel):
                attend()
                seconds = [harness.timed(attend, args.device)[1] for _ in range(args.rounds)]
            rows[kernel.name]["ms"] = [1000 * value / args.steps for value in seconds]
        except RuntimeError as error:  # not for this device, dtype or shape
            rows[kernel.name]["error"] = f"{type(error).__name__}: {one_line(error, 150)}"
        save(results)
    return results


class Candidate:
    """A model with an optimizer, from the same weights as the others."""

    def __init__(self, args: argparse.Namespace, name: str, mode: str, start: GPT2ReproForCausalLM) -> None:
        self.args = args
        self.model, self.compute_loss = train_step.build(argparse.Namespace(**vars(args) | {"candidate": name}))
        weights = (start.to_gpt2() if name == "transformers" else start).state_dict()
        if name == "plain":
            weights = start.transformer.state_dict()
            padding = len(self.model.state_dict()["wte.weight"]) - len(weights["wte.weight"])
            weights["wte.weight"] = F.pad(weights["wte.weight"], (0, 0, 0, padding))
        self.model.load_state_dict(weights)
        self.called = self.model.to(args.device).train()
        if mode == "compiled":  # as train.py does
            self.called = torch.compile(self.model, dynamic=False)  # type: ignore[assignment]  # a module, too
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, betas=(0.9, 0.95), fused=True)
        self.scaler = torch.amp.GradScaler(args.device.type, enabled=args.dtype == torch.float16)

    def steps(self, batches: Iterable[Batch]) -> list[float]:
        """Take an optimizer step for each batch. Return the losses, which are read at the end."""
        losses = []
        for inputs, targets, _ in batches:
            with torch.autocast(self.args.device.type, self.args.dtype):
                loss = self.compute_loss(self.called, inputs, targets)
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses).tolist()


def check_steps(args: argparse.Namespace, save: Save) -> Results:
    """Compare losses from the same weights on the same data, then tokens/s in turns."""
    torch.manual_seed(0)
    start = GPT2ReproForCausalLM(GPT2ReproConfig(**model_shape(args), n_positions=max(1024, args.seq_len)))
    batch = BatchConfig(tokens_per_step=args.batch * args.seq_len, seq_len=args.seq_len, micro_batch_size=args.batch)
    precision = "bf16" if args.dtype == torch.bfloat16 else "fp16"
    hardware = find_hardware(Accelerator(mixed_precision=precision, cpu=args.device.type == "cpu"))
    plan = Plan(shape=cast(GPT2ReproConfig, start.config), batch=batch, max_steps=1, hardware=hardware)
    memory = plan.estimate_memory(args.batch)
    shards = open_split(args.out / "shards", "train")
    loader = WindowLoader([shards], seq_len=args.seq_len, batch_size=args.batch, seed=0)
    batches = [loader.batch(step).to(args.device) for step in range(max(NUM_LOSSES, args.steps + 1))]
    modes = ("eager", "compiled") if args.compiled else ("eager",)
    rows = {f"{name} {mode}": Results() for mode in modes for name in ("ours", "transformers", "plain")}
    results: Results = {"sequences": args.batch, "plan GB, without torch": (memory.total - memory.base) / 1e9}
    results |= {"peak TFLOP/s": hardware.peak_flops / 1e12, "candidates": rows}
    candidates: dict[str, Candidate] = {}
    losses: dict[str, list[float]] = {}
    for key, row in rows.items():
        try:
            before = reset_peak(args.device)
            name, mode = key.split()
            candidates[key] = Candidate(args, name, mode, start)
            losses[key] = candidates[key].steps(batches[:NUM_LOSSES])
            if args.device.type == "cuda":
                row["peak GB"] = train_step.peak_memory_gb(args.device) - before
            row |= {"first loss": losses[key][0], f"loss {NUM_LOSSES}": losses[key][-1]}
            first = next(iter(losses))  # "ours eager", if it has not failed
            row[f"off {first}"] = max(abs(a - b) for a, b in zip(losses[key], losses[first], strict=True))
            candidates[key].optimizer.state.clear()  # makes room for the next candidate
        except Exception as error:  # out of memory, no compiler: the others are still worth their time
            row["error"] = f"{type(error).__name__}: {one_line(error, 150)}"
            candidates.pop(key, None)
        save(results | {"losses": losses})
    for key, candidate in [*candidates.items()] * args.rounds:
        candidate.steps(batches[:1])  # creates the optimizer's state
        _, seconds = harness.timed(partial(candidate.steps, batches[1 : args.steps + 1]), args.device)
        candidate.optimizer.state.clear()
        reset_peak(args.device)
        speed = args.steps * batch.tokens_per_step / seconds
        rows[key].setdefault("tokens/s", []).append(speed)
        rows[key].setdefault("MFU", []).append(speed * plan.flops_per_token / hardware.peak_flops)
        save(results | {"losses": losses})
    return results | {"losses": losses}


def check_training(args: argparse.Namespace, save: Save) -> Results:
    """Run train.py to its end; then once more, killed after a checkpoint and resumed."""
    micro, tokens = args.batch, args.batch * args.seq_len
    command = [sys.executable, "train.py", "--config", "recipes/gpt2_124m.yaml", "--data.path", f"{args.out}/shards"]
    command += [f"--model.{name}={value}" for name, value in model_shape(args).items()]
    command += [f"--batch.micro_batch_size={micro}", f"--batch.seq_len={args.seq_len}"]
    command += [f"--batch.tokens_per_step={ACCUMULATION * tokens}", f"--eval.val_tokens={tokens}"]
    command += [f"--max_steps={TRAIN_STEPS}", f"--save_every={SAVE_EVERY}", f"--eval_every={TRAIN_STEPS}"]
    command += [
        "--eval.hellaswag=null",
        "--eval.prompts=[]",
        "--trackers=[]",
        f"--compile={str(args.compiled).lower()}",
    ]

    def start(run: Path, *more: str) -> subprocess.Popen:
        return subprocess.Popen([*command, "--output_dir", str(run), *more])

    def seconds_to_end(process: subprocess.Popen) -> float:
        _, seconds = harness.timed(process.wait, torch.device("cpu"))
        if process.returncode:
            raise SystemExit(f"train.py failed with exit code {process.returncode}")
        return seconds

    runs = undisturbed, killed = args.out / "undisturbed", args.out / "killed"
    for run in runs:
        shutil.rmtree(run, ignore_errors=True)
    results: Results = {"seconds": seconds_to_end(start(undisturbed))}
    first = [record for record in read_metrics(undisturbed / "metrics.jsonl") if "loss" in record]
    results["tokens/s"] = statistics.median(record["tokens_per_s"] for record in first[TRAIN_STEPS // 2 :])
    save(results)
    process = start(killed)
    while process.poll() is None and not [*killed.glob("checkpoints/step_*")]:
        time.sleep(0.02)
    process.kill()
    results["was killed"] = process.wait() < 0  # not if it ended before
    results["seconds after the kill"] = seconds_to_end(start(killed, "--resume", "auto"))
    second = [record for record in read_metrics(killed / "metrics.jsonl") if "loss" in record]
    results["off the first run"] = max(abs(a["loss"] - b["loss"]) for a, b in zip(first, second, strict=True))
    return results


def check_hellaswag(args: argparse.Namespace, save: Save) -> Results:
    """Score items of HellaSwag's lengths with random tokens, twice."""
    rng, shapes = random.Random(0), set()
    tokens = [rng.randrange(50257) for _ in range(100)]
    requests = [
        Request(tokens[: rng.randint(5, 100)], [tokens[: rng.randint(8, 45)] for _ in range(4)])
        for _ in range(args.items)
    ]
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**model_shape(args))).to(args.device)
    model.transformer.wte.register_forward_pre_hook(lambda _, arguments: shapes.add(arguments[0].shape))
    results: Results = {"items": args.items}
    for number in ("first", "second"):
        with torch.autocast(args.device.type, args.dtype):
            _, results[f"{number} pass s"] = harness.timed(partial(loglikelihoods, model, requests), args.device)
        results["shapes"] = len(shapes)
        save(results)
    return results


def model_shape(args: argparse.Namespace) -> dict[str, Any]:
    """Return the model's shape in GPT-2's names."""
    return {"n_layer": args.layers, "n_head": args.heads, "n_embd": args.width}


def reset_peak(device: torch.device) -> float:
    """Return cached memory to the GPU and start a new peak. Return the GB that are allocated."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 1e9


PARTS: dict[str, tuple[Callable[[argparse.Namespace, Save], Results], float]] = {  # with the limit in seconds
    "machine": (check_machine, 60),
    "steps": (check_steps, 300),
    "train": (check_training, 240),
    "hellaswag": (check_hellaswag, 90),
}


def report(parts: dict[str, Results]) -> str:
    """Return the results of all parts as Markdown: a table of the single numbers, and one for each table."""
    sections = []
    for name, results in parts.items():
        sections.append(f"## {name}{'' if results.get('complete') else ': incomplete' if results else ': not run'}")
        shown = {key: value for key, value in results.items() if key not in ("complete", "settings", "losses")}
        tables = {key: shown.pop(key) for key, value in results.items() if key in shown and isinstance(value, dict)}
        sections.append(markdown.table((name, ""), ((key, format_result(value)) for key, value in shown.items())))
        for title, rows in tables.items():
            columns = [*dict.fromkeys(column for row in rows.values() for column in row)]
            cells = ([key, *(format_result(row.get(column, "-")) for column in columns)] for key, row in rows.items())
            sections.append(markdown.table([title, *columns], cells))
    return "\n\n".join(sections)


def format_result(value: object) -> str:
    """Return a result as text: of a list, the median with its range."""
    if isinstance(value, list):
        return harness.with_range(value, ",.0f" if min(value) > 100 else ".3f")
    return f"{value:,.5g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
