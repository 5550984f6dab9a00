"""Makes small networks that use every kind of layer, and batches for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Mixed(nn.Module):
    """Ties an embedding with the output, and has Conv1d, LayerNorm, Linear and a lone parameter: N = 1,440."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 12)
        self.conv = nn.Conv1d(12, 12, 3, padding=1)
        self.up = nn.Linear(12, 24)
        self.norm = nn.LayerNorm(24)
        self.down = nn.Linear(24, 12)
        self.scale = nn.Parameter(torch.ones(12))
        self.out = nn.Linear(12, 40, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.scale * self.down(F.gelu(self.norm(self.up(x))))
        return self.out(x)


def mixed(dtype: torch.dtype = torch.float32, seed: int = 0) -> Mixed:
    torch.manual_seed(seed)
    return Mixed().to(dtype)


def tokens(step: int, rows: int = 8) -> Tensor:
    """Returns a batch that does not see every token: unseen embedding rows tie at a zero gradient."""
    return torch.randint(0, 30, (rows, 6), generator=torch.Generator().manual_seed(step))


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Returns the next-token cross-entropy, in float32."""
    return F.cross_entropy(model(batch[:, :-1]).float().flatten(0, 1), batch[:, 1:].flatten())
