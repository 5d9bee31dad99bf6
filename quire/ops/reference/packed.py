"""Products with weights in each of their forms. Nothing is packed here: a form is its own packed weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quire.ops.reference.linear import linear
from quire.ops.weights import DenseWeight, Fp8Weight, Int4Weight, Int8Weight, Weight

TINY = torch.finfo(torch.float32).tiny


def pack(weight: Weight) -> Weight:
    return weight


def packed_linear(x: Tensor, packed: Weight, bias: Tensor | None = None) -> Tensor:
    match packed:
        case DenseWeight(values):
            return linear(x, values, bias)
        case Int8Weight(values, scales):
            q, s = _rows_as_int8(x.float())
            y = _int_product(q, values) * (s * scales)
        case Int4Weight(values, scales, zeros, size, order):
            y = _int4_product(x.float() if order is None else x.float()[:, order], values, scales, zeros, size)
        case Fp8Weight(values, scales):
            y = linear(x.float(), values.float()) * scales
    return (y if bias is None else y + bias.float()).to(x.dtype)


def packed_linears(x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor | None]) -> list[Tensor]:
    return [packed_linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def packed_linears_backward(dys: Sequence[Tensor | None], weights: Sequence[Weight], dtype: torch.dtype) -> Tensor:
    """The sum of dy W. That products round x to integers for some forms has no gradient."""
    given = [(dy, weight) for dy, weight in zip(dys, weights, strict=True) if dy is not None]
    return sum(dy.float() @ dense_values(weight).float() for dy, weight in given).to(dtype)


def packed_rows(ids: Tensor, packed: Weight, dtype: torch.dtype) -> Tensor:
    return dense_values(packed)[ids].to(dtype)


def dense_values(weight: Weight) -> Tensor:
    """The matrix [O, I] that a weight stands for; float32 unless it is dense."""
    match weight:
        case DenseWeight(values):
            return values
        case Int8Weight(values, scales) | Fp8Weight(values, scales):
            return values.float() * scales[:, None]
        case Int4Weight(_, scales, zeros, size, order):
            rows, columns = weight.shape
            grouped = nibbles(weight.values).view(rows, -1, size).float()
            values = ((grouped - zeros[:, :, None]) * scales[:, :, None]).view(rows, columns)
            return values if order is None else torch.empty_like(values).index_copy_(1, order, values)


def nibbles(values: Tensor) -> Tensor:
    """[O, I / 2] bytes -> [O, I] numbers 0 to 15."""
    return torch.stack([values & 15, values >> 4], dim=-1).flatten(1)


def _rows_as_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x over the last dimension as int8 with their scales [..., 1]."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(TINY)
    return torch.round(x / scale).to(torch.int8), scale


def _int_product(q: Tensor, values: Tensor) -> Tensor:
    """Exact sums of products of small integers, as float32."""
    return (q.double() @ values.double().t()).float()


def _int4_product(x: Tensor, values: Tensor, scales: Tensor, zeros: Tensor, size: int) -> Tensor:
    numbers = nibbles(values)
    y = x.new_zeros(len(x), len(values))
    for group in range(scales.shape[1]):
        columns = slice(group * size, (group + 1) * size)
        q, s = _rows_as_int8(x[:, columns])
        centred = numbers[:, columns].double() - zeros[:, group, None]
        y += _int_product(q, centred) * (s * scales[:, group])
    return y
