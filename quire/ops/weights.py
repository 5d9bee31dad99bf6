"""The forms in which the weight of a linear layer is kept, before an implementation packs it for its kernels.

Letters: O outputs, I inputs, R rank, G groups of consecutive inputs that share a scale.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DenseWeight:
    """values [O, I]: float32, bfloat16 or float16."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.values.shape)


@dataclass(frozen=True)
class Int8Weight:
    """w = values * scales. values int8 [O, I], scales float32 [O].

    Products take x as int8 too, each row with a scale of its own: round(x / s), s = max|x| / 127 (w8a8).
    """

    values: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.values.shape)


@dataclass(frozen=True)
class Int4Weight:
    """w[:, order[i]] = (values[:, i] - zeros[:, g]) * scales[:, g], g = i // group_size.

    values uint8 [O, I / 2] (input 2i in the low half of byte i), scales float32 [O, G], zeros uint8 [O, G]; order int64 [I]
    (None: as they are) is the order in which inputs lie in the groups (GPTQ's act-order). group_size: a multiple of 32 that
    divides I. Products take x as int8, with a scale for each row and group (w4a8).
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor
    group_size: int
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1] * 2


@dataclass(frozen=True)
class Fp8Weight:
    """w = values * scales. values float8_e4m3fn [O, I], scales float32 [O]. x stays as it is (w8a16)."""

    values: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.values.shape)


@dataclass(frozen=True)
class LoraWeight:
    """What one adapter adds to a product: scale * (x A^T) B^T (Hu et al. 2021).

    a [R, I] and b [R, O], which is B transposed: float32, contiguous.
    """

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class LoraTable:
    """The adapters of one linear layer by slot; None: that slot has nothing for this layer."""

    weights: tuple[LoraWeight | None, ...]

    @functools.cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """a and b of all slots that have some, in order."""
        return tuple(tensor for weight in self.weights if weight is not None for tensor in (weight.a, weight.b))


Weight = DenseWeight | Int8Weight | Int4Weight | Fp8Weight
