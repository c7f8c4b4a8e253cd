"""Shared by the end-to-end tests: a tiny recipe, a clean environment, a reader of losses."""

import json
import os
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Options of `accelerate launch`; port 0: one that is free.
TWO_PROCESSES = ["--config_file", "accelerate_configs/cpu_2proc.yaml", "--main_process_port", "0"]

RECIPE = """
model: {n_layer: 2, n_head: 2, n_embd: 32, n_positions: 32}
batch: {tokens_per_step: 256, seq_len: 32, micro_batch_size: 4}
optim: {lr: 3.0e-3, warmup_steps: 4}
eval: {val_tokens: 512, hellaswag: sample, hellaswag_limit: 6, ngram_baselines: true, prompts: [The], sample_tokens: 4}
max_steps: 20
eval_every: 10
save_every: 10
log_every: 5
trackers: []
mixed_precision: "no"
"""


def clean_environment(home):
    """An empty home, no network, one thread (tests run side by side), and nothing of an outer launch."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "HF_", "TORCHELASTIC"))}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    one_thread = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return environment | one_thread | {"HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def scored_task(tiny):
    """Settings of the task that `finished_run` scores besides HellaSwag."""
    return "--eval.tasks", "bits_per_byte:6@20", "--eval.task_data", f"{{bits_per_byte: {tiny.parent / 'shards'}}}"


def records(run, key=None):
    """Records of a run folder's metrics.jsonl, or those that have the key, in their order."""
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if key is None or key in record]


def losses(run):
    """Training losses of a run folder, in order of steps."""
    training = records(run, "loss")
    assert [r["step"] for r in training] == list(range(1, len(training) + 1))
    return [r["loss"] for r in training]
