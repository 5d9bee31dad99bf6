"""LoRA's products, adapter by adapter, in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quire.ops.reference.linear import linear
from quire.ops.weights import LoraTable, LoraWeight


def lora_table(weights: Sequence[LoraWeight | None]) -> LoraTable:
    return LoraTable(tuple(weights))


def loras(x: Tensor, ys: Sequence[Tensor], slots: Tensor, tables: Sequence[LoraTable]) -> list[Tensor]:
    return [lora(x, y, slots, table) for y, table in zip(ys, tables, strict=True)]


def lora(x: Tensor, y: Tensor, slots: Tensor, table: LoraTable) -> Tensor:
    out = y.clone()
    for slot, weight in enumerate(table.weights):
        rows = None if weight is None else (slots == slot).nonzero()[:, 0]
        if rows is not None and len(rows):
            product = linear(linear(x[rows].float(), weight.a), weight.b.t())
            out[rows] = (y[rows].float() + product * weight.scale).to(y.dtype)
    return out


def lora_backward(
    dy: Tensor, x: Tensor, slots: Tensor, table: LoraTable, need_x: bool, need_weights: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """With u = x A^T and g = scale * dy: dB = u^T g, dA = (g B)^T x, dx = (g B) A, each over the rows of its slot."""
    del need_weights  # all of them: this is for its meaning, not for speed
    dx = torch.zeros_like(x) if need_x else None
    gradients: list[Tensor | None] = []
    for slot, weight in enumerate(table.weights):
        if weight is None:
            continue
        rows = (slots == slot).nonzero()[:, 0]
        inputs, g = x[rows].float(), dy[rows].float() * weight.scale
        inner = g @ weight.b.t()
        gradients += [inner.t() @ inputs, (inputs @ weight.a.t()).t() @ g]
        if dx is not None:
            dx[rows] = (inner @ weight.a).to(x.dtype)
    return dx, gradients
