"""The pass: the linears of a tree become packed ones, each as soon as its stored parts are there, so that a weight is never
in memory twice for longer than its packing takes.

Dense weights are packed where the chosen operations want it (`ops.packs_dense`) and stay parameters elsewhere. Knows no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quire import ops
from quire.errors import ModelError
from quire.layers.embedding import Embedding
from quire.layers.linear import Linear
from quire.models.decoder import CausalLM
from quire.ops.weights import DenseWeight, Weight
from quire.quant import stored
from quire.quant.nearest import nearest
from quire.quant.scheme import HEAD, Scheme, form_at_load
from quire.quant.sizes import UNUSED


class PackedProduct:
    """A Linear's `format`: the product with a packed weight."""

    def __init__(self, packed: Any) -> None:
        self.packed = packed

    def __call__(self, linear: Linear, x: Tensor) -> Tensor:
        return ops.packed_linear(x, self.packed, linear.bias)

    @staticmethod
    def together(linears: Sequence[Linear], x: Tensor) -> list[Tensor]:
        """The same x times several linears of this format."""
        return ops.packed_linears(x, [linear.format.packed for linear in linears], [linear.bias for linear in linears])


class PackedTable:
    """An Embedding's `format`: rows of the packed weight that it shares with the head, as `dtype`."""

    def __init__(self, packed: Any, dtype: torch.dtype) -> None:
        self.packed, self.dtype = packed, dtype

    def __call__(self, embedding: Embedding, ids: Tensor) -> Tensor:
        del embedding
        return ops.packed_rows(ids, self.packed, self.dtype)


class Packing:
    """What becomes of the tensors of one model's linears while they come from their files.

    scheme: None where all weights are dense. keep_dense: do not pack dense weights (training and calibration need them).
    """

    def __init__(self, model: CausalLM, scheme: Scheme | None, dtype: torch.dtype, *, keep_dense: bool = False) -> None:
        self.model, self.scheme, self.dtype = model, scheme, dtype
        self.packs_dense = not keep_dense and ops.packs_dense()
        self.linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
        self.tied = model.config.tie_word_embeddings
        self.table = next(name for name, module in model.named_modules() if module is model.table)
        self._stored: dict[str, frozenset[str]] = {}
        self._waiting: dict[str, dict[str, Tensor]] = {}

    def expect(self, tensors: Iterable[tuple[str, str]]) -> dict[str, None]:
        """Told the (name, type) of each tensor of the files, in the tree's names: those that belong to quantized linears."""
        found: dict[str, set[str]] = {}
        for name, dtype in tensors:
            module, _, leaf = name.rpartition(".")
            if module in self.linears and stored.is_part(leaf, dtype):
                found.setdefault(module, set()).add(leaf)
        if found and (self.scheme is None or self.scheme.at_load):
            module, leaves = next(iter(found.items()))
            raise ModelError(
                f"{module} has {', '.join(sorted(leaves))}: quantized weights, but config.json has no quantization_config."
            )
        if self.tied and HEAD in found:
            raise ModelError(f"{HEAD} is quantized and tied to the token table, which is not supported.")
        self._stored = {module: frozenset(leaves) for module, leaves in found.items()}
        return {f"{module}.{leaf}": None for module, leaves in self._stored.items() for leaf in leaves}

    @property
    def replaced(self) -> set[str]:
        """Names of the parameters that do not exist because their linears are stored quantized."""
        return {f"{module}.weight" for module in self._stored}

    def take_part(self, name: str, tensor: Tensor) -> None:
        """A stored part of a quantized linear; packed when it was the last one."""
        module, _, leaf = name.rpartition(".")
        parts = self._waiting.setdefault(module, {})
        parts[leaf] = tensor
        if len(parts) < len(self._stored[module]):
            return
        linear = self.linears[module]
        self._set(linear, stored.read(module, self._waiting.pop(module), self.scheme, linear.outputs, linear.inputs))

    def take_weight(self, name: str, tensor: Tensor) -> bool:
        """A dense weight as stored; False if it is to stay a parameter."""
        module = name.removesuffix(".weight")
        tied = self.tied and module == self.table
        if module not in self.linears and not tied:
            return False
        form = None
        if self.scheme is not None and self.scheme.at_load:
            form = form_at_load(self.scheme.method, module, tensor.shape[1], self.tied)
        if form is None and not self.packs_dense:
            return False
        weight = DenseWeight(tensor.to(self.dtype).contiguous()) if form is None else nearest(tensor, form)
        self._set(self.model.lm_head if tied else self.linears[module], weight)
        return True

    def _set(self, linear: Linear, weight: Weight) -> None:
        self.set_packed(linear, ops.pack(weight))

    def set_packed(self, linear: Linear, packed: Any) -> None:
        """A linear of the model gets its packed weight; a head that is tied shares it with the token table."""
        set_packed(linear, packed)
        if linear is self.model.lm_head and self.tied:
            self.model.table.format = PackedTable(packed, self.dtype)
            self.model.table.weight = None


def set_packed(linear: Linear, packed: Any) -> None:
    """Let `linear` multiply by a packed weight and forget its own."""
    linear.format = PackedProduct(packed)
    linear.weight = None


def stores_packed() -> bool:
    """Whether packed weights can be taken apart and put together again."""
    return ops.stores_packed()


def parts_of(packed: Any) -> tuple[Mapping[str, int], dict[str, Tensor]]:
    """(plain numbers, tensors) that a packed weight consists of."""
    return ops.packed_parts(packed)


def linear_from_parts(linear: Linear, facts: Mapping[str, int], parts: Mapping[str, Tensor]) -> Any:
    """The packed weight of a linear. Raises ValueError if the parts are none, or those of another one."""
    packed = ops.packed_from_parts(facts, parts)
    if tuple(packed.shape) != (linear.outputs, linear.inputs):
        raise ValueError(f"a weight has shape {list(packed.shape)} where the model has {[linear.outputs, linear.inputs]}")
    return packed


def unused(name: str) -> bool:
    """Whether a stored tensor is one that quantized checkpoints have for what is calculated here as it comes (activations)."""
    return name.rpartition(".")[2] in UNUSED


def packed_weights(model: nn.Module) -> Mapping[str, Any]:
    """The packed weight of each packed linear, by module name."""
    return {
        name: module.format.packed
        for name, module in model.named_modules()
        if isinstance(module, Linear) and isinstance(module.format, PackedProduct)
    }
