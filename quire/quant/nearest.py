"""Rounding a dense matrix to the nearest numbers of a form. Rows are worked on in pieces, so that little memory is needed.

Letters: O outputs, I inputs, G groups, g group size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quire.ops.weights import DenseWeight, Fp8Weight, Int4Weight, Int8Weight, Weight
from quire.quant.scheme import Form

# Small enough to stay in a core's cache, and for freed pieces that the allocator keeps to be few.
PIECE = 1 << 17
MOST_INT8, MOST_INT4, MOST_FP8 = 127, 15, 448.0
MIDDLE = 8


def nearest(values: Tensor, form: Form | None) -> Weight:
    """values [O, I] in `form`, each number rounded to the nearest there is."""
    if form is None:
        return DenseWeight(values)
    if form.kind == "int4":
        return _int4(values, form.group_size or values.shape[1])
    out = torch.empty(values.shape, dtype=torch.int8 if form.kind == "int8" else torch.float8_e4m3fn)
    scales = torch.empty(len(values))
    for rows in pieces(values):
        wide = values[rows].float()
        if form.kind == "int8":
            scales[rows] = safe(wide.abs().amax(1) / MOST_INT8)
            out[rows] = torch.round(wide / scales[rows, None]).clamp(-MOST_INT8, MOST_INT8).to(torch.int8)
        else:
            scales[rows] = safe(wide.abs().amax(1) / MOST_FP8)
            out[rows] = (wide / scales[rows, None]).clamp(-MOST_FP8, MOST_FP8).to(torch.float8_e4m3fn)
    return Int8Weight(out, scales) if form.kind == "int8" else Fp8Weight(out, scales)


def pieces(values: Tensor) -> Iterator[slice]:
    """Rows of a matrix in slices of about PIECE numbers."""
    step = max(1, PIECE // max(1, values.shape[1]))
    return (slice(start, start + step) for start in range(0, len(values), step))


def safe(scales: Tensor) -> Tensor:
    """Scales of which none is 0: a row of zeros stays one with any scale."""
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def _int4(values: Tensor, size: int) -> Int4Weight:
    outputs, inputs = values.shape
    packed = torch.empty(outputs, inputs // 2, dtype=torch.uint8)
    scales = torch.empty(outputs, inputs // size)
    zeros = torch.empty(outputs, inputs // size, dtype=torch.uint8)
    for rows in pieces(values):
        grouped = values[rows].float().view(-1, inputs // size, size)
        scales[rows], wide_zeros = better_grid(grouped)
        zeros[rows] = wide_zeros.to(torch.uint8)
        packed[rows] = pack_nibbles(round_to(grouped, scales[rows], wide_zeros).view(-1, inputs).to(torch.uint8))
    return Int4Weight(packed, scales, zeros, size)


def round_to(grouped: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """grouped [..., G, g] as whole numbers 0 to 15 (in float32) of grids scales, zeros [..., G]."""
    return torch.round(grouped / scales[..., None]).add_(zeros[..., None]).clamp_(0, MOST_INT4)


def restored(numbers: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """What those numbers stand for."""
    return (numbers - zeros[..., None]) * scales[..., None]


def better_grid(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """(scales, zeros) [..., G] for grouped [..., G, g]: for each group the symmetric or the asymmetric grid, as errs less."""
    candidates = (symmetric_grid(grouped), asymmetric_grid(grouped))
    errors = [(restored(round_to(grouped, *grid), *grid) - grouped).square().sum(-1) for grid in candidates]
    first = errors[0] <= errors[1]
    return tuple(torch.where(first, one, other) for one, other in zip(*candidates, strict=True))


def symmetric_grid(grouped: Tensor, shrink: float = 1.0) -> tuple[Tensor, Tensor]:
    """Zero in the middle, at 8; the number that is largest in size lies at the end that has one step more."""
    extreme = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1) * shrink
    # A negative scale where the extreme is positive: (0 - 8) * scale reaches it exactly.
    scales = extreme / -MIDDLE
    return torch.where(scales != 0, scales, torch.ones_like(scales)), torch.full_like(scales, MIDDLE)


def asymmetric_grid(grouped: Tensor, shrink: float = 1.0) -> tuple[Tensor, Tensor]:
    """From the lowest to the highest number, both taken to be on their sides of 0."""
    low, high = grouped.amin(-1).clamp_max(0) * shrink, grouped.amax(-1).clamp_min(0) * shrink
    scales = safe((high - low) / MOST_INT4)
    return scales, torch.round(-low / scales).clamp(0, MOST_INT4)


def pack_nibbles(numbers: Tensor) -> Tensor:
    """[O, I] bytes 0 to 15 -> [O, I / 2], input 2i in the low half of byte i."""
    return numbers[:, 0::2] | (numbers[:, 1::2] << 4)
