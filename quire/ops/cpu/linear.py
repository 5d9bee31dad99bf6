"""Products with packed weights by the native kernels (csrc/linear.cpp)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.ops.cpu.library import DENSE, INT4, INT8, TYPES, WeightStruct, address, call, library
from quire.ops.room import uninitialized
from quire.ops.weights import DenseWeight, Fp8Weight, Int4Weight, Int8Weight, Weight

_long, _pointer = ctypes.c_int64, ctypes.c_void_p
PANEL = 32


@dataclass(frozen=True)
class PackedWeight:
    """A weight in the kernels' layout. `tensors` own the memory that `struct` points to."""

    struct: WeightStruct
    tensors: tuple[Tensor, ...]
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.struct.outputs, self.struct.inputs

    @functools.cached_property
    def address(self) -> int:
        return ctypes.addressof(self.struct)

    @functools.cached_property
    def family(self) -> tuple[int, ...]:
        """Weights of one family can be multiplied in one call."""
        return self.struct.form, self.struct.type, self.struct.inputs, self.struct.group_size

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def pack(weight: Weight) -> PackedWeight:
    match weight:
        case DenseWeight(values):
            return _packed(DENSE, values, values.shape)
        case Fp8Weight(values, scales):
            return _packed(DENSE, values, values.shape, scales=scales)
        case Int8Weight(values, scales):
            return _packed(INT8, values, values.shape, scales=_padded(scales))
        case Int4Weight(values, scales, zeros, group_size, order):
            return _packed(
                INT4,
                values,
                weight.shape,
                scales=_by_panel(scales),
                zeros=_by_panel(zeros),
                group_size=group_size,
                order=order,
            )


def _packed(
    form: int,
    values: Tensor,
    shape: tuple[int, int],
    *,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    group_size: int = 0,
    order: Tensor | None = None,
) -> PackedWeight:
    values = values if values.stride(-1) == 1 else values.contiguous()
    kind = TYPES.get(values.dtype, 0)
    data = uninitialized(library().quire_packed_bytes(form, kind, *shape), torch.uint8)
    scales = None if scales is None else scales.float().contiguous()
    zeros = None if zeros is None else zeros.contiguous()
    struct = WeightStruct(form, kind, *shape, group_size, data.data_ptr(), address(scales), address(zeros))
    call("pack", struct, values.data_ptr(), values.stride(0))
    return PackedWeight(struct, tuple(t for t in (data, scales, zeros) if t is not None), order)


def _padded(values: Tensor) -> Tensor:
    """The last dimension filled up to whole panels."""
    return torch.nn.functional.pad(values, (0, -values.shape[-1] % PANEL))


def _by_panel(values: Tensor) -> Tensor:
    """[outputs, groups] as [panels, groups, PANEL]."""
    return _padded(values.t()).unflatten(1, (-1, PANEL)).transpose(0, 1)


def packed_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    if packed.order is not None:
        x = x[:, packed.order]
    if x.stride(-1) != 1:
        x = x.contiguous()
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    y = x.new_empty(x.shape[0], packed.struct.outputs)
    call(
        "linear",
        packed.struct,
        TYPES[x.dtype],
        x.shape[0],
        x.data_ptr(),
        x.stride(0),
        address(bias),
        y.data_ptr(),
        y.stride(0),
    )
    return y


def packed_linears(x: Tensor, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None]) -> list[Tensor]:
    if len({weight.family for weight in weights}) > 1 or any(weight.order is not None for weight in weights):
        return [packed_linear(x, *one) for one in zip(weights, biases, strict=True)]
    if x.stride(-1) != 1:
        x = x.contiguous()
    biases = [bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype) for bias in biases]
    ys = [x.new_empty(x.shape[0], weight.struct.outputs) for weight in weights]
    count = len(weights)
    pointers, numbers = _pointer * count, _long * count
    call(
        "linears",
        count,
        pointers(*(weight.address for weight in weights)),
        TYPES[x.dtype],
        x.shape[0],
        x.data_ptr(),
        x.stride(0),
        pointers(*(address(bias) for bias in biases)),
        pointers(*(y.data_ptr() for y in ys)),
        numbers(*(y.stride(0) for y in ys)),
    )
    return ys


def packed_linears_backward(dys: Sequence[Tensor | None], weights: Sequence[PackedWeight], dtype: torch.dtype) -> Tensor:
    given = [(dy, weight) for dy, weight in zip(dys, weights, strict=True) if dy is not None]
    straight = [(dy, weight) for dy, weight in given if weight.order is None]
    dx = _turned(straight, dtype) if straight else None
    for dy, weight in given:
        if weight.order is not None:
            part = _turned([(dy, weight)], dtype)
            part = torch.empty_like(part).index_copy_(1, weight.order, part)
            dx = part if dx is None else dx.add_(part)
    return torch.zeros(0, 0, dtype=dtype) if dx is None else dx


def _turned(pairs: Sequence[tuple[Tensor, PackedWeight]], dtype: torch.dtype) -> Tensor:
    """The sum of dy W over (dy, W)."""
    dys = [dy if dy.stride(-1) == 1 else dy.contiguous() for dy, _ in pairs]
    count, rows, inputs = len(pairs), len(dys[0]), pairs[0][1].struct.inputs
    pointers, numbers = _pointer * count, _long * count
    dx = torch.empty((rows, inputs), dtype=dtype)
    call(
        "linears_backward",
        count,
        pointers(*(weight.address for _, weight in pairs)),
        TYPES[dys[0].dtype],
        TYPES[dtype],
        rows,
        pointers(*(dy.data_ptr() for dy in dys)),
        numbers(*(dy.stride(0) for dy in dys)),
        dx.data_ptr(),
        inputs,
    )
    return dx


def packed_rows(ids: Tensor, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    out = torch.empty(len(ids), packed.struct.inputs, dtype=dtype)
    ids = ids.contiguous()
    call("weight_rows", packed.struct, TYPES[dtype], len(ids), ids.data_ptr(), out.data_ptr())
    return out if packed.order is None else torch.empty_like(out).index_copy_(1, packed.order, out)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """With a weight that is not packed: packed for this one product (training without a packed base, small checks)."""
    return packed_linear(x, pack(DenseWeight(weight.detach())), bias)
