"""AdamW as GPT-3 used it; or, with `optim.muon_lr`, Muon on the blocks' matrices and AdamW on the rest."""

import torch

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
        torch.optim.AdamW with two groups, decayed first; or a MuonAdamW, whose first group is Muon's. Each group has
        "lr_ratio": its learning rate over `optim.lr`.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    of_muon = []
    if optim.muon_lr is not None:
        of_muon = [p for p in model.transformer.h.parameters() if p.dim() == 2 and p.requires_grad]
    taken = {id(p) for p in of_muon}
    matrices = [p for p in parameters if p.dim() >= 2 and id(p) not in taken]
    groups = [
        {"params": matrices, "weight_decay": optim.weight_decay, "lr_ratio": 1.0},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "lr_ratio": 1.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps, fused=device_type in _FUSED)
    if not of_muon:
        return adamw
    group = {"params": of_muon, "lr_ratio": optim.muon_lr / optim.lr}
    return MuonAdamW(torch.optim.Muon([group], lr=optim.muon_lr, weight_decay=optim.muon_weight_decay), adamw)


class MuonAdamW(torch.optim.Optimizer):
    """
    torch.optim.Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) and AdamW as one optimizer, for
    whoever schedules, shards, saves and loads.

    Like fused AdamW it changes nothing in a step for which `found_inf`, a scalar tensor, has been set to 1.
    """

    def __init__(self, muon, adamw):
        self._muon, self._adamw = muon, adamw
        super().__init__(muon.param_groups + adamw.param_groups, defaults={})
        self._share()

    def _share(self):
        """The two have this one's groups and state, and no others."""
        self._muon.param_groups = [group for group in self.param_groups if "momentum" in group]
        self._adamw.param_groups = [group for group in self.param_groups if "betas" in group]
        self._muon.state = self._adamw.state = self.state

    def __setstate__(self, state):
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure=None):
        found_inf = getattr(self, "found_inf", None)
        self._adamw.found_inf = found_inf
        self._adamw.step()
        if found_inf is None:
            self._muon.step()
            return
        # Muon does not know found_inf. The host is not to wait for it, so the step is taken and then taken back.
        parameters = [p for group in self._muon.param_groups for p in group["params"]]
        before = []
        for p in parameters:
            momentum = self.state[p].get("momentum_buffer")  # none before the first step, which begins with zeros
            before.append((p.clone(), torch.zeros_like(p) if momentum is None else momentum.clone()))
        self._muon.step()
        is_bad = found_inf.bool()
        for p, (old, old_momentum) in zip(parameters, before, strict=True):
            momentum = self.state[p]["momentum_buffer"]
            p.copy_(torch.where(is_bad, old, p))
            momentum.copy_(torch.where(is_bad, old_momentum, momentum))
