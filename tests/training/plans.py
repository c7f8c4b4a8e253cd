"""Plans and logs of runs that are not started."""

import torch

from modeling_gpt2repro import GPT2ReproConfig
from training.config import BatchConfig
from training.estimate import Hardware, Plan
from training.logging import RunLog


def make_plan(
    layers, width, heads, seq_len, rows, accumulation, precision, dropout=0.0, max_steps=10, device="cpu", **more
):
    """A plan for one process."""
    hardware = Hardware(torch.device(device), device, 1, 1, precision, 1e12, "made up", None)
    return Plan(
        shape=GPT2ReproConfig(
            n_layer=layers,
            n_embd=width,
            n_head=heads,
            n_positions=max(seq_len, 256),
            attn_pdrop=dropout,
            resid_pdrop=dropout,
        ),
        batch=BatchConfig(tokens_per_step=rows * seq_len * accumulation, seq_len=seq_len),
        max_steps=max_steps,
        hardware=hardware,
        **more,
    )


def make_log(folder, first_step=0, loss_lines=None, score_lines=None):
    """The log of a run in the folder: one process, a line per step."""
    settings = {"log_every": 1, "eval_every": 1, "trackers": [], "seed": 1, "init_from": None}
    settings["optim"] = {"max_skipped_steps": 2}
    plan = make_plan(1, 8, 1, 8, 1, 1, "no")
    return RunLog(folder, plan, settings, [], first_step, loss_lines=loss_lines or {}, score_lines=score_lines or {})
