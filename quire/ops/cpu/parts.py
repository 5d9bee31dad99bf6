"""Packed weights taken apart into plain numbers and tensors, and put together again. Knows no file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quire.ops.cpu.library import DENSE, E4M3, INT4, INT8, WeightStruct, address, library
from quire.ops.cpu.linear import PANEL, PackedWeight

_FACTS = ("form", "type", "outputs", "inputs", "group_size")


def packed_parts(packed: PackedWeight) -> tuple[Mapping[str, int], dict[str, Tensor]]:
    struct = packed.struct
    names = ["data", *(name for name in ("scales", "zeros") if getattr(struct, name))]
    parts = dict(zip(names, packed.tensors, strict=True))
    if packed.order is not None:
        parts["order"] = packed.order
    return {name: getattr(struct, name) for name in _FACTS}, parts


def packed_from_parts(facts: Mapping[str, int], parts: Mapping[str, Tensor]) -> PackedWeight:
    form, kind, outputs, inputs, group = (int(facts[name]) for name in _FACTS)
    data, scales, zeros, order = (parts.get(name) for name in ("data", "scales", "zeros", "order"))
    padded = -(-outputs // PANEL) * PANEL
    # What the kernels would read, whatever the facts say, must be there.
    groups = inputs // group if form == INT4 and group > 0 and inputs % group == 0 else 0
    wanted = {
        DENSE: {"scales": outputs if kind == E4M3 else 0},
        INT8: {"scales": padded},
        INT4: {"scales": groups * padded, "zeros": groups * padded},
    }.get(form)
    count = library().quire_packed_bytes(form, kind, outputs, inputs) if outputs > 0 and inputs > 0 else -1
    if wanted is None or count < 0 or (form == INT4 and not groups):
        raise ValueError("a weight has no such form")
    found = {name: parts[name].numel() for name in ("scales", "zeros") if name in parts}
    right = {name: number for name, number in wanted.items() if number}
    if data is None or data.nbytes != count or found != right or data.data_ptr() % 64:
        raise ValueError("a weight's parts have other sizes")
    types = {"data": torch.uint8, "scales": torch.float32, "zeros": torch.uint8, "order": torch.int64}
    if any(part.dtype != types.get(name) for name, part in parts.items()):
        raise ValueError("a weight's parts are of other types")
    if order is not None and not torch.equal(order.sort().values, torch.arange(inputs)):
        raise ValueError("a weight's order is none")
    struct = WeightStruct(form, kind, outputs, inputs, group, data.data_ptr(), address(scales), address(zeros))
    return PackedWeight(struct, tuple(part for part in (data, scales, zeros) if part is not None), order)
