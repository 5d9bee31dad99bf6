"""Gradients of the row operations by the native kernels (csrc/gradients.cpp), with respect to the rows. Where a weight wants
one too, rows.py derives the reference's formula."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.ops.cpu.library import TYPES, address, call

KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}


def as_rows(x: Tensor) -> tuple[Tensor, int, int]:
    """x, copied if its rows do not lie at one distance; the number of rows and that distance."""
    if x.dim() == 2:
        stride, last = x.stride()
        if last == 1:
            return x, len(x), stride
    x = x.contiguous()
    size = x.shape[-1]
    return x, x.numel() // size if size else 0, size


def rms_norm(dy: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, ...]:
    x, rows, stride = as_rows(x)
    dy, _, dy_stride = as_rows(dy)
    weight = weight.contiguous()
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    call(
        "rms_norm_backward",
        TYPES[x.dtype],
        TYPES[weight.dtype],
        rows,
        x.shape[-1],
        x.data_ptr(),
        stride,
        dy.data_ptr(),
        dy_stride,
        weight.data_ptr(),
        eps,
        offset,
        dx.data_ptr(),
    )
    return (dx,)


def layer_norm(dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    del bias
    x, rows, stride = as_rows(x)
    dy, _, dy_stride = as_rows(dy)
    weight = None if weight is None else weight.contiguous()
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    call(
        "layer_norm_backward",
        TYPES[x.dtype],
        0 if weight is None else TYPES[weight.dtype],
        rows,
        x.shape[-1],
        x.data_ptr(),
        stride,
        dy.data_ptr(),
        dy_stride,
        address(weight),
        eps,
        dx.data_ptr(),
    )
    return (dx,)


def activation(dy: Tensor, x: Tensor, kind: str) -> tuple[Tensor, ...]:
    return _activation(dy, x, None, kind)[:1]


def gated_activation(dy: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, ...]:
    of_gate, of_up = _activation(dy, gate, up.to(gate.dtype), kind)
    return of_gate, of_up.to(up.dtype)


def _activation(dy: Tensor, x: Tensor, up: Tensor | None, kind: str) -> tuple[Tensor, ...]:
    x, rows, stride = as_rows(x)
    dy, _, dy_stride = as_rows(dy)
    other, dup = (None, 0), None
    if up is not None:
        up, _, up_stride = as_rows(up)
        other = up.data_ptr(), up_stride
        dup = torch.empty_like(x, memory_format=torch.contiguous_format)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    call(
        "activation_backward",
        TYPES[x.dtype],
        KINDS[kind],
        rows,
        x.shape[-1],
        x.data_ptr(),
        stride,
        *other,
        dy.data_ptr(),
        dy_stride,
        dx.data_ptr(),
        address(dup),
    )
    return dx, dup
