"""The token table."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from quire import ops

Format = Callable[["Embedding", Tensor], Tensor]
Adapter = Callable[[Tensor, Tensor, Tensor], Tensor]


class Embedding(nn.Module):
    """ids [T] -> rows of weight [V, E].

    format: how the rows are stored (None: dense). adapter: (ids, y, slots) -> y with the rows' adapters applied.
    """

    format: Format | None = None
    adapter: Adapter | None = None

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size))
        if not self.weight.is_meta:  # see Linear
            nn.init.normal_(self.weight, std=0.02)

    def forward(self, ids: Tensor, adapters: Tensor | None = None) -> Tensor:
        y = ops.embedding(ids, self.weight) if self.format is None else self.format(self, ids)
        return y if self.adapter is None or adapters is None else self.adapter(ids, y, adapters)
