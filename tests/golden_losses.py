"""Write tests/golden_losses.json, with which tests/test_golden.py compares the code.

    python tests/golden_losses.py        adds this Python's sample corpus, and computes the other again

First training losses of the sample recipe in float32 on a CPU, on two corpora: the sample itself, whose text is the
Python version's, and token ids drawn from a seed, the same everywhere. With AdamW at a moderate rate: with Muon, a
difference of 1e-7 in the sums of a matmul becomes 1e-4 within 12 steps.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
FILE = Path(__file__).with_suffix(".json")
STEPS = 12
ARGUMENTS = (
    *("--mixed_precision", "no", "--trackers", "[]", "--eval.val_tokens", "1024", "--eval.hellaswag", "null"),
    *("--eval.ngram_baselines", "false", "--eval.prompts", "[]", "--max_steps", "1250"),
    *("--optim.muon_lr", "null", "--optim.lr", "2e-3", "--optim.betas", "[0.9, 0.999]", "--optim.warmup_steps", "50"),
    *("--optim.final_lr_fraction", "0.2", "--optim.cooldown_fraction", "null"),
)


def write_seeded_corpus(folder):
    """60,000 training and 5,000 validation tokens: document starts, and ids by Zipf's law."""
    sys.path.insert(0, str(ROOT))
    from data.shards import ShardWriter

    generator = np.random.Generator(np.random.PCG64(0))
    folder.mkdir()
    with ThreadPoolExecutor(1) as executor:
        for split, count in (("train", 60_000), ("val", 5_000)):
            tokens = np.minimum(generator.zipf(1.2, count), 50_256) - 1
            tokens[::500] = 50_256
            writer = ShardWriter(folder, f"seeded_{split}_", shard_tokens=count, executor=executor)
            writer.add(tokens.astype(np.uint16), [500] * (count // 500))
            writer.finish()


def first_losses(shards, output, environment):
    """The losses of a run of the sample recipe that is killed when it has got so far."""
    command = [sys.executable, "train.py", *ARGUMENTS, "--data.path", str(shards), "--data.prepare_sample"]
    command += ["--output_dir", str(output)]
    run = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    metrics, losses = output / "metrics.jsonl", []
    deadline = time.monotonic() + 240
    while len(losses) < STEPS and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
        lines = metrics.read_text().splitlines(keepends=True) if metrics.is_file() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        losses = [record["loss"] for record in records if "loss" in record][:STEPS]
    run.send_signal(signal.SIGKILL)
    error = run.communicate()[1]
    assert len(losses) == STEPS, error
    return losses


def corpus_sha256(shards):
    """Return the SHA-256 of each training shard."""
    manifest = json.loads((shards / "manifest.json").read_text())
    return [shard["sha256"] for shard in manifest["shards"] if shard["split"] == "train"]


def main():
    import torch
    import transformers

    golden = json.loads(FILE.read_text()) if FILE.is_file() else {"sample": []}
    made_with = {
        "command": "python train.py " + " ".join(ARGUMENTS),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
    }
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_seeded_corpus(folder / "seeded")
        golden["seeded"] = made_with | {"losses": first_losses(folder / "seeded", folder / "run", os.environ)}
        losses = first_losses(folder / "sample", folder / "run2", os.environ)
        corpus = corpus_sha256(folder / "sample")
    others = [entry for entry in golden["sample"] if entry["corpus_sha256"] != corpus]
    golden["sample"] = [*others, made_with | {"corpus_sha256": corpus, "losses": losses}]
    FILE.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
