"""LoRA's products, adapter by adapter, in float32."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from quire.ops.reference.linear import linear
from quire.ops.weights import LoraTable, LoraWeight


def lora_table(weights: Sequence[LoraWeight | None]) -> LoraTable:
    return LoraTable(tuple(weights))


def lora(x: Tensor, y: Tensor, slots: Tensor, table: LoraTable) -> Tensor:
    out = y.clone()
    for slot, weight in enumerate(table.weights):
        rows = None if weight is None else (slots == slot).nonzero()[:, 0]
        if rows is not None and len(rows):
            product = linear(linear(x[rows].float(), weight.a), weight.b.t())
            out[rows] = (y[rows].float() + product * weight.scale).to(y.dtype)
    return out
