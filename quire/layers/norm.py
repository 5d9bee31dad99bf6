"""Normalisation layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quire import ops


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension. offset: 1 where the checkpoint stores weight - 1 (Gemma)."""

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps, self.offset)


class LayerNorm(nn.Module):
    """Mean-and-variance norm over the last dimension; affine=False has no weights."""

    def __init__(self, size: int, eps: float, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size)) if affine else None
        self.bias = nn.Parameter(torch.zeros(size)) if affine else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)
