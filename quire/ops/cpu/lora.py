"""What adapters add to products, by the native kernels (csrc/lora.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quire.ops.cpu.library import TYPES, LoraPartStruct, LoraTableStruct, call
from quire.ops.weights import LoraTable, LoraWeight

_pointer, _long = ctypes.c_void_p, ctypes.c_int64


@dataclass(frozen=True)
class NativeTable(LoraTable):
    """With the addresses of all matrices as the kernels read them: `struct` lies at `address` and points to `parts`."""

    parts: ctypes.Array[LoraPartStruct] = field(repr=False)
    struct: LoraTableStruct = field(repr=False)
    address: int

    @property
    def inputs(self) -> int:
        return self.struct.inputs

    @property
    def outputs(self) -> int:
        return self.struct.outputs


def lora_table(weights: Sequence[LoraWeight | None]) -> NativeTable:
    given = [weight for weight in weights if weight is not None]
    sizes = {(weight.a.shape[1], weight.b.shape[1]) for weight in given}
    assert len(sizes) <= 1, f"adapters of one linear, but of several sizes: {sizes}"
    for weight in given:
        assert weight.a.dtype == weight.b.dtype == torch.float32
        assert weight.a.is_contiguous()
        assert weight.b.is_contiguous()
        assert len(weight.a) == len(weight.b)
    parts = (LoraPartStruct * len(weights))(*(_part(weight) for weight in weights))
    inputs, outputs = sizes.pop() if sizes else (1, 1)
    struct = LoraTableStruct(inputs, outputs, len(weights), ctypes.addressof(parts))
    return NativeTable(tuple(weights), parts, struct, ctypes.addressof(struct))


def _part(weight: LoraWeight | None) -> LoraPartStruct:
    if weight is None or len(weight.a) == 0:
        return LoraPartStruct()
    return LoraPartStruct(weight.a.data_ptr(), weight.b.data_ptr(), len(weight.a), weight.scale)


def lora(x: Tensor, y: Tensor, slots: Tensor, table: NativeTable) -> Tensor:
    """y is overwritten."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    if y.stride(-1) != 1:
        y = y.contiguous()
    assert slots.dtype == torch.int32
    assert x.dtype == y.dtype
    slots = slots.contiguous()
    call(
        "lora",
        table.address,
        TYPES[x.dtype],
        x.shape[0],
        x.data_ptr(),
        x.stride(0),
        y.data_ptr(),
        y.stride(0),
        slots.data_ptr(),
    )
    return y


def loras(x: Tensor, ys: Sequence[Tensor], slots: Tensor, tables: Sequence[NativeTable]) -> list[Tensor]:
    """The ys are overwritten."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    ys = [y if y.stride(-1) == 1 else y.contiguous() for y in ys]
    assert slots.dtype == torch.int32
    slots = slots.contiguous()
    assert all(y.dtype == x.dtype for y in ys)
    filled = [(y, table) for y, table in zip(ys, tables, strict=True) if any(table.weights)]
    count = len(filled)
    pointers, numbers = _pointer * count, _long * count
    if count:
        call(
            "loras",
            count,
            pointers(*(table.address for _, table in filled)),
            TYPES[x.dtype],
            x.shape[0],
            x.data_ptr(),
            x.stride(0),
            pointers(*(y.data_ptr() for y, _ in filled)),
            numbers(*(y.stride(0) for y, _ in filled)),
            slots.data_ptr(),
        )
    return ys


def lora_backward(
    dy: Tensor, x: Tensor, slots: Tensor, table: NativeTable, need_x: bool, need_weights: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    if x.stride(-1) != 1:
        x = x.contiguous()
    if dy.stride(-1) != 1 or dy.dtype != x.dtype:
        dy = dy.to(x.dtype).contiguous()
    slots = slots.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype) if need_x else None
    wanted = iter(need_weights)
    gradients: list[Tensor | None] = []
    places: tuple[list[int | None], list[int | None]] = ([], [])
    for weight in table.weights:
        for side, tensor in zip(places, (None, None) if weight is None else (weight.a, weight.b), strict=True):
            gradient = None
            if tensor is not None:
                gradient = torch.empty(tensor.shape, dtype=tensor.dtype) if next(wanted) else None
                gradients.append(gradient)
            side.append(None if gradient is None or not gradient.numel() else gradient.data_ptr())
    pointers = _pointer * len(table.weights)
    call(
        "lora_backward",
        table.address,
        TYPES[x.dtype],
        x.shape[0],
        x.data_ptr(),
        x.stride(0),
        dy.data_ptr(),
        dy.stride(0),
        slots.data_ptr(),
        None if dx is None else dx.data_ptr(),
        pointers(*places[0]) if any(places[0]) else None,
        pointers(*places[1]) if any(places[1]) else None,
    )
    return dx, gradients
