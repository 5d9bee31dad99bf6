"""GPTQ (Frantar et al. 2022): round column by column, and let the columns not yet rounded make up for the error.

Columns go in the order of their inputs' size, the largest first, on grids that were fixed before: the gain of act-order
without its permutation at run time ("static groups").
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.quant.grid import Grid, fitted_grid

DAMPING = 0.01
BLOCK = 128


def rounded(weight: Tensor, gram: Tensor, size: int, symmetric: bool) -> tuple[Tensor, Grid]:
    """(numbers 0 to 15 as float32 [O, I], their grid) for weight float32 [O, I] whose inputs have this gram [I, I]."""
    gram = gram.clone()
    dead = gram.diagonal() == 0
    gram.diagonal()[dead] = 1.0
    grid = fitted_grid(weight, gram, size, symmetric)
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    inverse = _inverse_factor(gram[order][:, order])
    # Transposed, so that a column lies in one piece of memory.
    left = weight.t()[order].contiguous()
    left[dead[order]] = 0
    scales, zeros = (part.t()[order // size].contiguous() for part in (grid.scales, grid.zeros))
    numbers = torch.empty_like(left)
    for start in range(0, len(left), BLOCK):
        end = min(start + BLOCK, len(left))
        errors = torch.empty(end - start, left.shape[1])
        for column in range(start, end):
            value, scale, zero = left[column], scales[column], zeros[column]
            number = torch.round(value / scale).add_(zero).clamp_(0, 15)
            numbers[column] = number
            error = (value - (number - zero) * scale) / inverse[column, column]
            left[column:end].addr_(inverse[column, column:end], error, alpha=-1)
            errors[column - start] = error
        left[end:].addmm_(inverse[start:end, end:].t(), errors, alpha=-1)
    return torch.empty_like(numbers).index_copy_(0, order, numbers).t().contiguous(), grid


def _inverse_factor(gram: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of gram, damped until it has one."""
    damping = DAMPING * float(gram.diagonal().mean())
    while True:
        damped = gram.double()
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper.float()
        damping *= 10
