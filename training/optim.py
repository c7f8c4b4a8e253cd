"""AdamW as GPT-3 used it."""

import torch

# Device types whose AdamW has one fused kernel (torch 2.10 and newer).
_FUSED = ("cpu", "cuda", "mps", "xpu")


def build_optimizer(model, optim, device_type):
    """
    AdamW that decays matrices and embeddings and leaves biases and LayerNorms alone.

    Args:
        model: its parameters are grouped by their number of dimensions; a tied matrix counts once.
        optim: training.config.OptimConfig.
        device_type: where the parameters will be ("cpu", "cuda", ...); decides whether a fused kernel exists.

    Returns:
        torch.optim.AdamW with two groups, decayed first.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps, fused=device_type in _FUSED)
