"""Time what a checkpoint costs training: written in the foreground, in the background, and never.

    python -m benchmarks.saving [--layers 12 --width 768] [--steps 12 --every 4] [--rounds 3]

Prints a table of the milliseconds per step and the milliseconds that training waits for a save.
"""

import tempfile
from functools import partial

import torch
from accelerate import Accelerator

from benchmarks.harness import make_parser, print_report, take_turns, timed, with_range
from data.tokenizer import GPT2
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from training.checkpoint import CheckpointWriter, LoopState
from training.config import OptimConfig
from training.distributed import keep_freed_memory
from training.optim import build_optimizer
from training.sharding import compile_and_wrap

SEQ_LEN = 512
COLUMNS = ("written", "ms per step", "ms training waits for a save")


def main() -> None:
    """Parse the arguments, measure and print the table."""
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rows", type=int, default=1, help=f"sequences of {SEQ_LEN} tokens per step")
    parser.add_argument("--steps", type=int, default=12, help="training steps per turn")
    parser.add_argument("--every", type=int, default=4, help="steps between checkpoints")
    args = parser.parse_args()

    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision="bf16")
    device = accelerator.device
    if device.type == "cpu":
        keep_freed_memory()
    config = GPT2ReproConfig(n_layer=args.layers, n_embd=args.width, n_head=args.width // 64)
    model = GPT2ReproForCausalLM(config).to(device).train()
    optimizer = build_optimizer(model, OptimConfig(lr=1e-4))
    models = compile_and_wrap(accelerator, model, optimizer, accumulation=1, use_compile=False)
    tokenizer = GPT2.hf(model_max_length=1024)
    tokens = torch.randint(0, 50257, (args.rows, SEQ_LEN + 1), device=device)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()

    def step() -> None:
        with accelerator.autocast():
            loss = models.wrapped(input_ids=inputs, shift_labels=targets, return_logits=False).loss
        loss.backward()
        models.optimizer.step()
        models.optimizer.zero_grad()

    def train(written: str) -> tuple[float, float]:
        """Train for a turn. Return the mean milliseconds of a step and of a wait."""
        steps, waits = [], []
        with tempfile.TemporaryDirectory() as folder:
            fingerprint, in_background = {"tokens_per_step": args.rows * SEQ_LEN}, written == "background"
            writer = CheckpointWriter(
                folder, accelerator, models, tokenizer, fingerprint, keep_last=1, in_background=in_background
            )

            for number in range(args.steps):
                if written != "never" and number % args.every == 0:
                    waits.append(timed(partial(writer.save, LoopState(step=number)), device)[1])
                steps.append(timed(step, device)[1])
            writer.finish()
        return 1000 * sum(steps) / len(steps), 1000 * sum(waits) / max(1, len(waits))

    for _ in range(3):
        step()
    candidates = {written: partial(train, written) for written in ("never", "foreground", "background")}
    results = take_turns(candidates, args.rounds, lambda ms: f"{ms[0]:,.0f} ms per step, {ms[1]:,.0f} ms per save")
    rows = [[name, *(with_range(ms, ",.0f") for ms in zip(*turns, strict=True))] for name, turns in results.items()]
    title = f"{args.layers} layers, width {args.width}, {args.rows * SEQ_LEN} tokens per step"
    print_report(title, args.rounds, COLUMNS, rows)


if __name__ == "__main__":
    main()
