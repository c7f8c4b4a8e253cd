"""Plans for tests of the estimates."""

import torch

from modeling_gpt2repro import GPT2ReproConfig
from training.config import BatchConfig
from training.estimate import Hardware, Plan


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
