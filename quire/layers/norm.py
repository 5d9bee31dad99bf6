"""Normalisation layers, with a socket for adapters that have a weight or a bias of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from quire import ops

Adapter = Callable[[Tensor, Tensor, Tensor], Tensor]


class Norm(nn.Module):
    """What both kinds have in common.

    adapter: (x, y, slots) -> y with the rows' own weights and biases. offset: what is added to the stored weight.
    """

    adapter: Adapter | None = None
    offset: float = 0.0
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def forward(self, x: Tensor, adapters: Tensor | None = None) -> Tensor:
        """adapters: as in `Batch`, of the first dimension of x."""
        y = self.normed(x)
        return y if self.adapter is None or adapters is None else self.adapter(x, y, adapters)

    def normed(self, x: Tensor) -> Tensor:
        """x by the base's own weight and bias."""
        raise NotImplementedError

    def unweighted(self, x: Tensor) -> Tensor:
        """x before weight and bias, in float32."""
        raise NotImplementedError


class RMSNorm(Norm):
    """Root-mean-square norm over the last dimension. offset: 1 where the checkpoint stores weight - 1 (Gemma)."""

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))
        self.bias = None
        self.eps, self.offset = eps, offset

    def normed(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps, self.offset)

    def unweighted(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x.float(), torch.ones(x.shape[-1], device=x.device), self.eps)


class LayerNorm(Norm):
    """Mean-and-variance norm over the last dimension; affine=False has no weights."""

    def __init__(self, size: int, eps: float, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size)) if affine else None
        self.bias = nn.Parameter(torch.zeros(size)) if affine else None
        self.eps = eps

    def normed(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def unweighted(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x.float(), None, None, self.eps)
