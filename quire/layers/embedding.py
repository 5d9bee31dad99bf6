"""The token table."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quire import ops


class Embedding(nn.Module):
    """ids [T] -> rows of weight [V, E]."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size))
        if not self.weight.is_meta:  # see Linear
            nn.init.normal_(self.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        return ops.embedding(ids, self.weight)
