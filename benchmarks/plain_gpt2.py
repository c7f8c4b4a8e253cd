"""A plain GPT-2 to compare with: what the lecture's model computes, in few lines and without an eye on memory.

Like build-nanogpt's, its vocabulary is padded to 50,304, attention is torch's, and the loss is F.cross_entropy on all
logits at once. Parameters have the names of this project's GPT2ReproModel.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB_SIZE = 50304


class PlainBlock(nn.Module):
    """Attention and MLP, each added to the residual stream."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(width, 3 * width), "c_proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        heads = self.attn["c_attn"](self.ln_1(x)).unflatten(-1, (3, self.num_heads, -1))  # [B, T, 3, H, D/H]
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attn["c_proj"](output.transpose(1, 2).flatten(2))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh"))


class PlainGPT2(nn.Module):
    """GPT-2 with the loss. The head is the matrix of the token embedding."""

    def __init__(self, *, n_layer: int, n_head: int, n_embd: int, n_positions: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB_SIZE, n_embd), nn.Embedding(n_positions, n_embd)
        self.h = nn.ModuleList(PlainBlock(n_embd, n_head) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)
        nn.init.normal_(self.wte.weight, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of the targets [B, T] after the tokens [B, T]."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)  # [B, T, V]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
