"""
The plan's memory estimate against the peak resident memory of real runs on a CPU: two steps of train.py in a process of
its own, for shapes that differ in what takes the memory.

    python benchmarks/memory.py [--only WORDS]

Prints a line a shape: GB estimated, GB at the peak, their ratio.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# layers, width, heads, T, sequences, accumulation, precision, dropout
SHAPES = [
    (12, 768, 12, 1024, 4, 2, "bf16", 0.0),
    (12, 768, 12, 1024, 4, 1, "bf16", 0.0),
    (12, 768, 12, 1024, 2, 2, "no", 0.0),
    (12, 768, 12, 512, 8, 2, "bf16", 0.1),
    (24, 1024, 16, 1024, 1, 2, "bf16", 0.0),
    (12, 384, 6, 256, 32, 2, "no", 0.0),
    (6, 384, 6, 256, 2, 2, "no", 0.0),
    (6, 384, 6, 256, 96, 2, "no", 0.0),
    (6, 384, 6, 256, 2, 2, "bf16", 0.0),
    (6, 384, 6, 256, 96, 2, "bf16", 0.0),
]
PROGRAM = """
import resource, sys, train
train.train(sys.argv[1:])
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="shapes whose line contains this")
    only = parser.parse_args().only
    with tempfile.TemporaryDirectory() as folder:
        for number, (layers, width, heads, seq_len, rows, accumulation, precision, dropout) in enumerate(SHAPES):
            name = (
                f"{layers} x {width}, {rows} x {seq_len} x {accumulation} accumulated, {precision}, dropout {dropout}"
            )
            if only not in name:
                continue
            settings = {
                "model.n_layer": layers,
                "model.n_embd": width,
                "model.n_head": heads,
                "model.n_positions": seq_len,
                "model.dropout": dropout,
                "batch.seq_len": seq_len,
                "batch.micro_batch_size": rows,
                "batch.tokens_per_step": rows * seq_len * accumulation,
                "mixed_precision": precision,
                "max_steps": 2,
                "eval_every": 100,
                "save_every": "null",
                "eval.val_tokens": 1024,
                "eval.hellaswag": "null",
                "eval.prompts": "[]",
                "eval.ngram_baselines": "false",
                "trackers": "[]",
                "data.path": Path(folder) / "sample",
                "output_dir": Path(folder) / f"run{number}",
            }
            arguments = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
            )
            estimate = float(re.search(r"memory +about ([\d.]+) GB", done.stdout)[1])
            peak = int(re.search(r"PEAK (\d+)", done.stdout)[1]) / 1e9
            print(f"| {name} | {estimate:.2f} | {peak:.2f} | {estimate / peak:.2f} |", flush=True)


if __name__ == "__main__":
    main()
