"""Compare the plan's memory estimate with the peak resident memory of real runs on a CPU.

    python -m benchmarks.memory [--only TEXT]

Each run is two steps of train.py in a fresh process; the shapes differ in what takes most of the memory. Prints a table
of GB estimated, GB at the peak, and their ratio.
"""

import re
import subprocess
import sys
import tempfile

from benchmarks.harness import make_parser
from common.markdown import table

# layers, width, heads, T, micro-batch size, accumulation, precision, dropout
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
SETTINGS = """
--model.n_layer {0} --model.n_embd {1} --model.n_head {2} --model.n_positions {3} --model.dropout {7}
--batch.seq_len {3} --batch.micro_batch_size {4} --batch.tokens_per_step {tokens} --mixed_precision {6}
--max_steps 2 --eval_every 100 --save_every null --eval.val_tokens 1024 --eval.hellaswag null --eval.prompts []
--eval.ngram_baselines false --trackers [] --data.path {folder}/sample --output_dir {folder}/run{number}
"""
PROGRAM = """
import resource, sys, train
train.train(sys.argv[1:])
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def main() -> None:
    """Parse the arguments, run the shapes and print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", default="", help="only shapes whose line contains this text")
    only = parser.parse_args().only
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        prepare = [sys.executable, "-m", "data.prepare", "sample", "--out", f"{folder}/sample"]
        subprocess.run(prepare, stdout=subprocess.DEVNULL, check=True)
        for number, shape in enumerate(SHAPES):
            layers, width, _, seq_len, size, accumulation, precision, dropout = shape
            name = (
                f"{layers} x {width}, {size} x {seq_len} x {accumulation} accumulated, {precision}, dropout {dropout}"
            )
            if only not in name:
                continue
            tokens = size * seq_len * accumulation
            settings = SETTINGS.format(*shape, tokens=tokens, folder=folder, number=number).split()
            command = [sys.executable, "-c", PROGRAM, *settings]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            [estimate] = map(float, re.findall(r"memory +about ([\d.]+) GB", done.stdout))
            [peak] = (int(size) / 1e9 for size in re.findall(r"PEAK (\d+)", done.stdout))
            rows.append([name, f"{estimate:.2f}", f"{peak:.2f}", f"{estimate / peak:.2f}"])
            print(*rows[-1], flush=True)
    print(f"\n{table(('shape', 'estimate', 'real', 'ratio'), rows)}")


if __name__ == "__main__":
    main()
