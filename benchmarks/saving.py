"""
What a checkpoint costs training: steps of a model with a checkpoint every few of them, written in the foreground, in
the background, and not at all, in turns.

    python benchmarks/saving.py [--layers 12 --width 768] [--steps 12 --every 4] [--rounds 3]

Prints milliseconds: of a step without saving, of the wait for a save, and what the steps during a write took longer.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # `data` and `training` are not installed

from data.tokenizer import load_hf_tokenizer  # noqa: E402
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM  # noqa: E402
from training.checkpoint import CheckpointWriter  # noqa: E402
from training.config import OptimConfig  # noqa: E402
from training.distributed import keep_freed_memory  # noqa: E402
from training.optim import build_optimizer  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rows", type=int, default=1, help="sequences of 512 a step")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision="bf16")
    device = accelerator.device
    if device.type == "cpu":
        keep_freed_memory()
    config = GPT2ReproConfig(n_layer=args.layers, n_embd=args.width, n_head=args.width // 64)
    model = GPT2ReproForCausalLM(config).to(device).train()
    optimizer = build_optimizer(model, OptimConfig(lr=1e-4), device.type)
    model, optimizer = accelerator.prepare(model, optimizer)
    tokens = torch.randint(0, 50257, (args.rows, 513), device=device)

    def step():
        started = time.perf_counter()
        with accelerator.autocast():
            model(
                input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:].contiguous(), return_logits=False
            ).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
        return time.perf_counter() - started

    for _ in range(3):
        step()
    numbers = {"never": [], "foreground": [], "background": []}
    for _ in range(args.rounds):
        for kind in numbers:
            with tempfile.TemporaryDirectory() as folder:
                writer = CheckpointWriter(
                    folder,
                    accelerator=accelerator,
                    model=model,
                    tokenizer=load_hf_tokenizer(model_max_length=1024),
                    keep_last=1,
                    in_background=kind == "background",
                )
                steps, waits = [], []
                for number in range(args.steps):
                    if kind != "never" and number % args.every == 0:
                        started = time.perf_counter()
                        writer.finished(wait=True)
                        writer.save(model, optimizer, {"step": number, "val_loss": None})
                        waits.append(time.perf_counter() - started)
                    steps.append(step())
                writer.finished(wait=True)
                numbers[kind].append((sum(steps) / len(steps), sum(waits) / max(1, len(waits))))
                shutil.rmtree(Path(folder) / "checkpoints", ignore_errors=True)
    for kind, rounds in numbers.items():
        steps, waits = zip(*rounds, strict=True)
        print(
            f"| {kind} | {1000 * statistics.median(steps):.0f} ({1000 * min(steps):.0f} to {1000 * max(steps):.0f}) | "
            f"{1000 * statistics.median(waits):.0f} |"
        )


if __name__ == "__main__":
    main()
