"""Runs text through a model layer by layer and says what the inputs of each linear look like, for methods that mind them.

A layer sees what the layers before it give as they are by then, quantized ones included. Letters: T tokens, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quire import ops
from quire.batch import packed
from quire.layers.linear import Linear
from quire.models.decoder import CausalLM

# Tokens that go through a layer at once.
TOKENS = 4096


@dataclass
class Inputs:
    """What a linear was given: gram [I, I], the sum of x^T x, and sizes [I], the sum of |x|, over `count` rows, in float32."""

    gram: Tensor
    sizes: Tensor
    count: int = 0

    @classmethod
    def none(cls, width: int) -> Inputs:
        return cls(torch.zeros(width, width), torch.zeros(width))

    def add(self, x: Tensor) -> None:
        wide = x.float()
        self.gram.addmm_(wide.t(), wide)
        self.sizes += wide.abs().sum(0)
        self.count += len(x)


class _Recorder:
    """A Linear's `format` that multiplies as before and notes what came in."""

    def __init__(self) -> None:
        self.inputs: Inputs | None = None

    def __call__(self, linear: Linear, x: Tensor) -> Tensor:
        if self.inputs is None:
            self.inputs = Inputs.none(linear.inputs)
        self.inputs.add(x)
        return ops.linear(x, linear.weight, linear.bias)


@torch.no_grad()
def walk(model: CausalLM, rows: Sequence[Sequence[int]]) -> Iterator[tuple[str, nn.Module, dict[str, Inputs]]]:
    """(name, layer, inputs of its linears by their names in the layer) for each layer in order.

    Whoever walks may change a layer's weights before asking for the next one, whose inputs are those that follow from it.
    """
    name, layers = layers_of(model)
    streams, others = _first_inputs(model, layers, rows)
    for index, layer in enumerate(layers):
        with_weights = {key: module for key, module in layer.named_modules() if isinstance(module, Linear)}
        recorders = {key: _Recorder() for key in with_weights}
        for key, module in with_weights.items():
            module.format = recorders[key]
        for x, rest in zip(streams, others, strict=True):
            layer(x, *rest[index])
        for module in with_weights.values():
            module.format = None
        yield f"{name}.{index}", layer, {
            key: recorder.inputs or Inputs.none(with_weights[key].inputs) for key, recorder in recorders.items()
        }
        streams = [layer(x, *rest[index]) for x, rest in zip(streams, others, strict=True)]


def layers_of(model: CausalLM) -> tuple[str, nn.ModuleList]:
    """The list of layers and its name."""
    count = model.config.num_layers
    return next(
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    )


def _first_inputs(
    model: CausalLM, layers: nn.ModuleList, rows: Sequence[Sequence[int]]
) -> tuple[list[Tensor], list[list[tuple[Any, ...]]]]:
    """For each batch: the stream before the first layer, and what else each layer is called with (rotations, the batch)."""
    streams, others = [], []
    seen: list[tuple[Any, ...]] = []
    hooks = [layer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments)) for layer in layers]
    try:
        for batch in _batches(rows):
            seen.clear()
            model(packed(batch))
            streams.append(seen[0][0])
            others.append([arguments[1:] for arguments in seen])
    finally:
        for hook in hooks:
            hook.remove()
    return streams, others


def _batches(rows: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
    step = max(1, TOKENS // max(len(row) for row in rows))
    return (rows[start : start + step] for start in range(0, len(rows), step))
