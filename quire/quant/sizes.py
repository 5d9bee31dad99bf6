"""How many bytes the weights of a checkpoint take in memory, from names, shapes and types alone. Knows no torch.

Counts what quire/ops/weights.py defines; an implementation's packed layout may add padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quire.quant.scheme import AT_LOAD, GROUPS, Form, Scheme, form_at_load

if TYPE_CHECKING:
    from quire.models.config import ModelConfig

SCALE, ZERO, INDEX = 4, 1, 8
# Tensors of quantized checkpoints that are folded into others, or are of no use here (see quire/quant/stored.py).
PARTS = (
    "qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point",
    "weight_g_idx", "weight_shape",
)  # fmt: skip
UNUSED = ("input_scale", "input_zero_point", "input_scale_ub", "output_scale", "k_scale", "v_scale", "q_scale", "kv_scale")
Stored = tuple[str, tuple[int, ...], str]


@dataclass(frozen=True)
class Sizes:
    """elements: of dense tensors, which take the engine's type. fixed: bytes that do not depend on it."""

    elements: int
    fixed: int = 0

    def bytes_as(self, item: int) -> int:
        return self.elements * item + self.fixed

    def __add__(self, other: Sizes) -> Sizes:
        return Sizes(self.elements + other.elements, self.fixed + other.fixed)


@dataclass(frozen=True)
class WeightSizes:
    """A checkpoint's weights as they are, and as each way of quantizing at load would make them."""

    as_stored: Sizes
    at_load: Mapping[str, Sizes] = field(default_factory=dict)

    def of(self, scheme: Scheme | None) -> Sizes:
        return self.at_load.get(scheme.method, self.as_stored) if scheme is not None and scheme.at_load else self.as_stored


def form_bytes(form: Form, outputs: int, inputs: int, ordered: bool = False) -> int:
    """Bytes of one weight in that form."""
    if form.kind != "int4":
        return outputs * inputs + outputs * SCALE
    groups = inputs // (form.group_size or inputs)
    return outputs * inputs // 2 + outputs * groups * (SCALE + ZERO) + (inputs * INDEX if ordered else 0)


def dense_sizes(tensors: Iterable[Stored], *, tied: bool, transposed: bool = False) -> WeightSizes:
    """Of a dense checkpoint. transposed: its matrices are [I, O] (GPT-2)."""
    tensors = [entry for entry in tensors if not (tied and entry[0].endswith("lm_head.weight"))]
    made = {}
    for kind in AT_LOAD:
        sizes = Sizes(0)
        for name, shape, _ in tensors:
            outputs, inputs = (shape if not transposed else shape[::-1]) if len(shape) == 2 else (0, 0)
            form = form_at_load(kind, name.removesuffix(".weight"), inputs, tied) if len(shape) == 2 else None
            sizes += Sizes(math.prod(shape)) if form is None else Sizes(0, form_bytes(form, outputs, inputs))
        made[kind] = sizes
    return WeightSizes(Sizes(sum(math.prod(shape) for _, shape, _ in tensors)), made)


def quantized_sizes(tensors: Iterable[Stored], scheme: Scheme, *, tied: bool) -> WeightSizes:
    """Of a checkpoint that is quantized already: its weights keep their numbers, scales become float32, zeros bytes."""
    sizes = Sizes(0)
    for name, shape, dtype in tensors:
        leaf = name.rpartition(".")[2]
        if leaf in UNUSED or (tied and name.endswith("lm_head.weight")):
            continue
        if leaf in ("qweight", "weight_packed"):
            sizes += Sizes(0, math.prod(shape) * 4)
        elif leaf == "weight" and dtype in ("I8", "F8_E4M3"):
            sizes += Sizes(0, form_bytes(Form("int8"), shape[0], math.prod(shape[1:])))
        elif leaf == "scales" or (leaf == "weight_scale" and scheme.form.kind == "int4"):
            sizes += Sizes(0, math.prod(shape) * (SCALE + ZERO))
        elif leaf in ("g_idx", "weight_g_idx"):
            sizes += Sizes(0, math.prod(shape) * INDEX if scheme.act_order else 0)
        elif leaf not in PARTS:
            sizes += Sizes(math.prod(shape))
    return WeightSizes(sizes)


def estimated_sizes(total: int, model: ModelConfig) -> WeightSizes:
    """Of `total` elements, where only their number is known: the matrices' share is calculated from the configuration."""
    linears = min(total, layer_elements(model))
    head = min(total - linears, model.vocab_size * model.hidden_size)
    rest = total - linears - head
    int4 = linears // 2 + linears * (SCALE + ZERO) // GROUPS[0]
    made = {"int8": Sizes(rest, linears + head), "int4": Sizes(rest, int4 + head), "fp8": Sizes(rest + head, linears)}
    return WeightSizes(Sizes(total), made)


def layer_elements(model: ModelConfig) -> int:
    """Elements of the matrices of a decoder's layers, norms and biases left out."""
    attention = model.hidden_size * model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
    width = int(model.raw.get("moe_intermediate_size") or model.intermediate_size)
    return model.num_layers * (attention + 3 * model.hidden_size * width * max(1, model.num_experts))
