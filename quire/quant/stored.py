"""The tensors that published checkpoints keep of a quantized linear, read into the forms of quire/ops/weights.py.

    awq             qweight int32 [I, O/8], qzeros int32 [G, O/8], scales [G, O]; of eight outputs, in AWQ's order
    gptq            qweight int32 [I/8, O], qzeros int32 [G, O/8] (less one in the first format), scales [G, O], g_idx [I]
    pack-quantized  weight_packed int32 [O, I/8], weight_scale [O, G], weight_zero_point int32 [O/8, G], weight_g_idx [I]
    quantized       weight int8 or float8_e4m3fn [O, I], weight_scale or weight_scale_inv: one, [O] or [O, 1]

Eight 4-bit numbers lie in an int32, the first in its lowest bits. This room reads no file and knows no module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quire.errors import ModelError
from quire.ops.reference.packed import dense_values
from quire.ops.weights import Fp8Weight, Int4Weight, Int8Weight, Weight
from quire.quant.nearest import MIDDLE, pack_nibbles
from quire.quant.scheme import Scheme

PER_WORD = 8
# Rows that are made dense at a time.
PIECE = 1024
# Place i of a word holds output AWQ_ORDER[i] of its eight.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ_PLACES = tuple(AWQ_ORDER.index(output) for output in range(PER_WORD))

Parts = Mapping[str, Tensor]


def is_part(leaf: str, dtype: str) -> bool:
    """Whether a tensor of that name (its last part) and type (in safetensors' spelling) belongs to a quantized weight."""
    return leaf in _LEAVES or (leaf == "weight" and dtype in ("I8", "F8_E4M3", "F8_E5M2"))


_LEAVES = (
    "qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_shape", "weight_scale", "weight_scale_inv",
    "weight_zero_point", "weight_g_idx",
)  # fmt: skip


def read(module: str, parts: Parts, scheme: Scheme, outputs: int, inputs: int) -> Weight:
    """The weight [O, I] of `module` from its stored parts. Raises ModelError naming a part that is missing or misshapen."""
    reader = {"awq": _awq, "gptq": _gptq, "pack-quantized": _pack_quantized, "quantized": _quantized}[scheme.layout or ""]
    return reader(_Parts(module, parts, scheme, outputs, inputs))


def dense(weight: Weight) -> Tensor:
    """The matrix [O, I] that a weight stands for, float32; made in pieces, as what is between takes several times its size."""
    out = torch.empty(weight.shape)
    for start in range(0, len(out), PIECE):
        rows = slice(start, start + PIECE)
        fields = {name: getattr(weight, name)[rows] for name in ("values", "scales", "zeros") if hasattr(weight, name)}
        out[rows] = dense_values(replace(weight, **fields))
    return out


class _Parts:
    """The stored tensors of one linear, each looked up with the shape that it must have."""

    def __init__(self, module: str, tensors: Parts, scheme: Scheme, outputs: int, inputs: int) -> None:
        self.module, self.tensors, self.scheme, self.outputs, self.inputs = module, tensors, scheme, outputs, inputs
        self.size = scheme.form.group_size or inputs
        if scheme.form.kind == "int4" and (inputs % self.size or self.size % 32 or outputs % PER_WORD):
            raise ModelError(
                f"{module} has {inputs} inputs and {outputs} outputs, which groups of {self.size} and words of {PER_WORD} "
                "do not divide: not supported."
            )

    @property
    def groups(self) -> int:
        return self.inputs // self.size

    def get(self, name: str, *shapes: tuple[int, ...]) -> Tensor:
        if name not in self.tensors:
            raise ModelError(f"{self.module} has no {name}, which {self.scheme.method} weights need.")
        tensor = self.tensors[name]
        if tuple(tensor.shape) not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise ModelError(f"{self.module}.{name} has shape {list(tensor.shape)}, the configuration says {wanted}.")
        return tensor

    def words(self, name: str, *shape: int) -> Tensor:
        words = self.get(name, shape)
        if words.dtype != torch.int32:
            raise ModelError(f"{self.module}.{name} has type {words.dtype}, {self.scheme.method} weights keep int32.")
        return words


def _awq(parts: _Parts) -> Int4Weight:
    words = parts.outputs // PER_WORD
    values = _unpacked(parts.words("qweight", parts.inputs, words), 1)[..., _AWQ_PLACES].flatten(1)
    zeros = _unpacked(parts.words("qzeros", parts.groups, words), 1)[..., _AWQ_PLACES].flatten(1)
    scales = parts.get("scales", (parts.groups, parts.outputs))
    return _int4(values.t(), scales.t(), zeros.t(), parts.size)


def _gptq(parts: _Parts) -> Int4Weight:
    inputs, outputs = parts.inputs, parts.outputs
    values = _unpacked(parts.words("qweight", inputs // PER_WORD, outputs), 2).flatten(1)
    zeros = _unpacked(parts.words("qzeros", parts.groups, outputs // PER_WORD), 1).flatten(1)
    # In four bits: AutoGPTQ and its kernels wrap a stored 15 to 0.
    zeros = (zeros + parts.scheme.zero_offset) & 15
    scales = parts.get("scales", (parts.groups, outputs))
    order = _order(parts, "g_idx") if "g_idx" in parts.tensors else None
    return _int4(values if order is None else values[:, order], scales.t(), zeros.t(), parts.size, order)


def _pack_quantized(parts: _Parts) -> Int4Weight:
    outputs, inputs, groups = parts.outputs, parts.inputs, parts.groups
    values = _unpacked(parts.words("weight_packed", outputs, inputs // PER_WORD), 1).flatten(1)
    scales = parts.get("weight_scale", (outputs, groups))
    if "weight_zero_point" in parts.tensors:
        stored = parts.get("weight_zero_point", (outputs // PER_WORD, groups), (outputs, groups))
        # Packed along the outputs, or as plain signed numbers by earlier releases.
        packed = stored.dtype == torch.int32 and len(stored) != outputs
        zeros = _unpacked(stored, 2).flatten(1).t() if packed else stored.to(torch.int16) + MIDDLE
    else:
        zeros = torch.full((outputs, groups), MIDDLE)
    order = _order(parts, "weight_g_idx") if "weight_g_idx" in parts.tensors else None
    return _int4(values if order is None else values[:, order], scales, zeros, parts.size, order)


def _quantized(parts: _Parts) -> Weight:
    values = parts.get("weight", (parts.outputs, parts.inputs))
    expected = torch.int8 if parts.scheme.form.kind == "int8" else torch.float8_e4m3fn
    if values.dtype != expected:
        raise ModelError(f"{parts.module}.weight has type {values.dtype}, {parts.scheme.method} says {expected}.")
    if "weight_zero_point" in parts.tensors and parts.tensors["weight_zero_point"].to(torch.int32).any():
        raise ModelError(f"{parts.module}.weight_zero_point must be 0: asymmetric 8-bit weights are not supported.")
    name = "weight_scale_inv" if "weight_scale_inv" in parts.tensors else "weight_scale"
    scales = parts.get(name, (), (1,), (parts.outputs,), (parts.outputs, 1), (1, 1))
    scales = scales.float().flatten().expand(parts.outputs).contiguous()
    return Int8Weight(values, scales) if expected == torch.int8 else Fp8Weight(values, scales)


def _int4(values: Tensor, scales: Tensor, zeros: Tensor, size: int, order: Tensor | None = None) -> Int4Weight:
    zeros = zeros.to(torch.uint8).contiguous()
    return Int4Weight(pack_nibbles(values), scales.float().contiguous(), zeros, size, order)


def _unpacked(words: Tensor, kind: int) -> Tensor:
    """int32 [A, B] -> bytes: kind 1 [A, B, 8], numbers of a word side by side; kind 2 [B, A, 8], for words down a column."""
    if kind == 2:
        words = words.t()
    # Bytes of a word, lowest first on every machine that Quire runs on; two numbers to a byte.
    halves = words.contiguous().view(torch.uint8).view(*words.shape, PER_WORD // 2)
    return torch.stack([halves & 15, halves >> 4], dim=-1).flatten(-2)


def _order(parts: _Parts, name: str) -> Tensor | None:
    """The order in which inputs lie in their groups; None if it is the natural one."""
    groups = parts.get(name, (parts.inputs,)).long()
    if (groups < 0).all():  # compressed-tensors' mark for "not set"
        return None
    order = torch.argsort(groups, stable=True)
    natural = torch.arange(parts.inputs) // parts.size
    if not torch.equal(groups[order], natural):
        raise ModelError(f"{parts.module}.{name} must put {parts.size} inputs into each of {parts.groups} groups.")
    return None if torch.equal(groups, natural) else order
