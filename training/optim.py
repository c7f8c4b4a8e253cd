"""AdamW as GPT-3 used it; or, with `optim.muon_lr`, Muon on the blocks' matrices and AdamW on the rest."""

import torch

from training.muon import MuonAdamW

# Device types whose AdamW has one fused kernel (torch 2.10 and newer).
_FUSED = ("cpu", "cuda", "mps", "xpu")


def build_optimizer(model, optim, device_type):
    """
    Decays matrices and embeddings and leaves biases and LayerNorms alone.

    Args:
        model: its parameters are grouped by their number of dimensions; a tied matrix counts once.
        optim: training.config.OptimConfig.
        device_type: where the parameters will be ("cpu", "cuda", ...); decides whether a fused kernel exists.

    Returns:
        torch.optim.AdamW with two groups, decayed first; or a MuonAdamW, which has two groups of Muon's before them.
        Each group has "lr_ratio": its learning rate over `optim.lr`.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    of_muon = []
    if optim.muon_lr is not None:
        of_muon = [p for p in model.transformer.h.parameters() if p.dim() == 2 and p.requires_grad]
    taken = set(of_muon)
    matrices = [p for p in parameters if p.dim() >= 2 and p not in taken]
    groups = [
        {"params": matrices, "weight_decay": optim.weight_decay, "lr_ratio": 1.0},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "lr_ratio": 1.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps, fused=device_type in _FUSED)
    if not of_muon:
        return adamw
    of_attention = {block.attn.c_attn.weight for block in model.transformer.h}  # Q, K and V in one
    muon = {"lr": optim.muon_lr, "weight_decay": optim.muon_weight_decay, "lr_ratio": optim.muon_lr / optim.lr}
    muon_groups = [
        {"params": [p for p in of_muon if p in of_attention], "parts": 3, **muon},
        {"params": [p for p in of_muon if p not in of_attention], "parts": 1, **muon},
    ]
    return MuonAdamW(muon_groups, adamw)
