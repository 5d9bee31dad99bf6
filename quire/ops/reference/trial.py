"""Data on which two orders of summation give different results, for finding out whether two kernels sum alike.

Every product of a row and a column is a sum whose terms cancel in pairs: its exact value is 0, and what a kernel returns is
nothing but its own rounding errors. On ordinary data those would hide below the last bit of a bfloat16 result.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cancelling(rows: int, inner: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(left [rows, inner], right [inner, columns]) whose product is 0 but for rounding."""
    generator = torch.Generator().manual_seed(rows * 31 + inner)
    pairs = torch.randperm(inner, generator=generator)[: inner // 2 * 2].view(2, -1)
    left = torch.randn(rows, inner, generator=generator)
    right = torch.randn(inner, columns, generator=generator)
    left[:, pairs[1]] = left[:, pairs[0]]
    right[pairs[1]] = -right[pairs[0]]
    return left.to(dtype), right.to(dtype)
