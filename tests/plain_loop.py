"""The reference for runs of tiny_run.py's recipe: transformers' GPT-2 in a plain PyTorch loop, with torch's AdamW."""

import math

import torch

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM


def initial_gpt2(vocab_size):
    """transformers' GPT-2 with the recipe's shape, its first weights, and no dropout."""
    torch.manual_seed(1337)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32, "vocab_size": vocab_size}
    gpt2 = GPT2ReproForCausalLM(GPT2ReproConfig(**shape)).to_gpt2().train()
    assert all(getattr(module, "p", 0) == 0 for module in gpt2.modules())
    return gpt2


def train_by_hand(gpt2, batches):
    """Take a step per batch, (inputs, targets) of the whole global batch, and return the losses."""
    groups = [[p for p in gpt2.parameters() if p.dim() >= 2], [p for p in gpt2.parameters() if p.dim() < 2]]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    losses = []
    for step, (inputs, targets) in enumerate(batches):
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 4) / (len(batches) - 4)))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * ((step + 1) / 4 if step < 4 else cosine)
        loss = torch.nn.functional.cross_entropy(gpt2(inputs).logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt2.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
