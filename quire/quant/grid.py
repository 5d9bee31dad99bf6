"""Four-bit grids for the groups of a matrix, chosen for the inputs that it will see and for what a file can hold.

Scales are float16 numbers, as published layouts keep them. Letters: O outputs, I inputs, G groups, g group size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.quant.nearest import MIDDLE, asymmetric_grid, pieces, restored, round_to, safe

# Least scale: float16 has nothing between 6e-8 and 0.
LEAST = 2.0**-20
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


@dataclass(frozen=True)
class Grid:
    """scales float32 (float16 numbers) and zeros float32 (1 to 15), each [O, G], for groups of `size`."""

    scales: Tensor
    zeros: Tensor
    size: int

    def rounded(self, weight: Tensor) -> Tensor:
        """The numbers 0 to 15 nearest to weight [O, I], as float32 [O, I]."""
        return round_to(weight.view(len(weight), -1, self.size), self.scales, self.zeros).view_as(weight)

    def restored(self, numbers: Tensor) -> Tensor:
        """What numbers [O, I] stand for."""
        return restored(numbers.view(len(numbers), -1, self.size), self.scales, self.zeros).view_as(numbers)

    def nearest(self, weight: Tensor) -> Tensor:
        return self.restored(self.rounded(weight))


def plain_grid(weight: Tensor, size: int, symmetric: bool, shrink: float = 1.0) -> Grid:
    """The grid of each group's range, a little shrunk."""
    grouped = weight.view(len(weight), -1, size)
    if symmetric:
        scales, zeros = safe(grouped.abs().amax(-1) * shrink / 7.5), torch.full(grouped.shape[:2], float(MIDDLE))
    else:
        scales, zeros = asymmetric_grid(grouped.amin(-1) * shrink, grouped.amax(-1) * shrink)
    scales = scales.clamp_min(LEAST).half().float()
    # Never 0: the first GPTQ format keeps zero - 1 in four bits.
    return Grid(scales, zeros.clamp(1, 15), size)


def fitted_grid(weight: Tensor, gram: Tensor, size: int, symmetric: bool, shrinks: Sequence[float] = SHRINKS) -> Grid:
    """For each group the shrunk grid whose rounding errs least on the inputs that `gram` [I, I] sums up (AWQ's clipping)."""
    inputs = weight.shape[1]
    blocks = torch.stack([gram[start : start + size, start : start + size] for start in range(0, inputs, size)])
    scales, zeros = torch.empty(len(weight), inputs // size), torch.empty(len(weight), inputs // size)
    for rows in pieces(weight):
        part = weight[rows]
        best = torch.full((len(part), inputs // size), torch.inf)
        for shrink in shrinks:
            grid = plain_grid(part, size, symmetric, shrink)
            error = (grid.nearest(part) - part).view(len(part), -1, size).transpose(0, 1)
            loss = ((error @ blocks) * error).sum(-1).t()
            better = loss < best
            best = torch.where(better, loss, best)
            scales[rows] = torch.where(better, grid.scales, scales[rows])
            zeros[rows] = torch.where(better, grid.zeros, zeros[rows])
    return Grid(scales, zeros, size)


def output_error(difference: Tensor, gram: Tensor) -> float:
    """Sum of squares of x difference^T over the inputs that `gram` sums up."""
    return float(((difference @ gram) * difference).sum())
