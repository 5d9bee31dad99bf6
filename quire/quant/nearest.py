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
        numbers, scales[rows], chosen = better_grid(values[rows].float().view(-1, inputs // size, size))
        zeros[rows] = chosen.to(torch.uint8)
        packed[rows] = pack_nibbles(numbers.view(-1, inputs).to(torch.uint8))
    return Int4Weight(packed, scales, zeros, size)


def round_to(grouped: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """grouped [..., G, g] as whole numbers 0 to 15 (in float32) of grids scales, zeros [..., G]."""
    return (grouped * scales.reciprocal()[..., None]).round_().add_(zeros[..., None]).clamp_(0, MOST_INT4)


def restored(numbers: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """What those numbers stand for."""
    return (numbers - zeros[..., None]).mul_(scales[..., None])


def better_grid(grouped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(numbers, scales [..., G], zeros) of grouped [..., G, g]: each group's symmetric or asymmetric grid, as errs less."""
    low, high = grouped.amin(-1), grouped.amax(-1)
    grids = (symmetric_grid(low, high), asymmetric_grid(low, high))
    numbers = [round_to(grouped, *grid) for grid in grids]
    restorations = [restored(one, *grid) for one, grid in zip(numbers, grids, strict=True)]
    errors = [torch.linalg.vector_norm(one.sub_(grouped), dim=-1) for one in restorations]
    first = errors[0] <= errors[1]
    scales, zeros = (torch.where(first, one, other) for one, other in zip(*grids, strict=True))
    return torch.where(first[..., None], *numbers), scales, zeros


def symmetric_grid(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Zero in the middle, at 8; the number that is largest in size lies at the end that has one step more."""
    # A negative scale where the extreme is positive: (0 - 8) * scale reaches it exactly.
    scales = torch.where(high > -low, high, low) / -MIDDLE
    return torch.where(scales != 0, scales, torch.ones_like(scales)), torch.full_like(scales, MIDDLE)


def asymmetric_grid(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """From the lowest to the highest number, both taken to be on their sides of 0."""
    low, high = low.clamp_max(0), high.clamp_min(0)
    scales = safe((high - low) / MOST_INT4)
    return scales, torch.round(-low / scales).clamp(0, MOST_INT4)


def pack_nibbles(numbers: Tensor) -> Tensor:
    """[O, I] bytes 0 to 15 -> [O, I / 2], input 2i in the low half of byte i."""
    return numbers[:, 0::2] | (numbers[:, 1::2] << 4)
