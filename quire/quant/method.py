"""The methods of `quire quantize`: from a dense model and rows of tokens to the stored parts of its quantized linears.

Changes the model as it goes (later layers are to see what earlier ones became). Knows no file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quire.errors import ConfigError
from quire.layers.linear import Linear
from quire.models.decoder import CausalLM
from quire.quant import awq, gptq, save
from quire.quant.calibrate import Inputs, layers_of, walk
from quire.quant.grid import plain_grid
from quire.quant.scheme import SMALLEST_GROUP, form_at_load

METHODS = {"awq": 4, "gptq": 4, "int8": 8, "fp8": 8}
CALIBRATED = ("awq", "gptq")


@dataclass(frozen=True)
class Recipe:
    """What to make. bits: None for the method's. symmetric: zero in the middle of each group (gptq)."""

    method: str
    bits: int | None = None
    group_size: int = 128
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}.")
        if self.bits not in (None, METHODS[self.method]):
            raise ConfigError(f"bits must be {METHODS[self.method]} for {self.method}, got {self.bits}.")
        if self.group_size < SMALLEST_GROUP or self.group_size % SMALLEST_GROUP:
            raise ConfigError(f"group_size must be a multiple of {SMALLEST_GROUP}, got {self.group_size}.")
        if self.symmetric and self.method != "gptq":
            raise ConfigError(f"symmetric must be left out for {self.method}: its layout says how zeros are.")


@dataclass
class Made:
    """parts: the stored tensors of each quantized linear. changed: other parameters that have new values, by name."""

    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def quantize(model: CausalLM, rows: Sequence[Sequence[int]], recipe: Recipe, advance: Callable[[int], None]) -> Made:
    """Quantize the linears of all layers; `advance(1)` after each layer. rows: what awq and gptq calibrate with."""
    made = Made()
    if recipe.method not in CALIBRATED:
        name, layers = layers_of(model)
        for index, layer in enumerate(layers):
            for key, linear in _wanted(f"{name}.{index}", layer, recipe).items():
                write = save.int8_parts if recipe.method == "int8" else save.fp8_parts
                made.parts[f"{name}.{index}.{key}"] = write(linear.weight)
            advance(1)
        return made
    for name, layer, inputs in walk(model, rows):
        wanted = _wanted(name, layer, recipe)
        if recipe.method == "awq":
            before = {key: parameter.clone() for key, parameter in layer.named_parameters()}
            awq.fold_scales(layer, inputs, dict.fromkeys(wanted, recipe.group_size), recipe.symmetric)
            quantized = {f"{key}.weight" for key in wanted}
            for key, parameter in layer.named_parameters():
                if key not in quantized and not torch.equal(parameter, before[key]):
                    made.changed[f"{name}.{key}"] = parameter.detach()
        for key, linear in wanted.items():
            made.parts[f"{name}.{key}"] = _four_bits(linear, inputs[key], recipe)
        advance(1)
    return made


def _four_bits(linear: Linear, inputs: Inputs, recipe: Recipe) -> dict[str, Tensor]:
    """The stored parts of one linear, whose weight becomes what they stand for."""
    weight, size = linear.weight.float(), recipe.group_size
    if recipe.method == "awq":
        numbers, grid = awq.rounded(weight, inputs.gram, size, recipe.symmetric)
    elif inputs.count:
        numbers, grid = gptq.rounded(weight, inputs.gram, size, recipe.symmetric)
    else:  # an expert that no row was sent to
        grid = plain_grid(weight, size, recipe.symmetric)
        numbers = grid.rounded(weight)
    linear.weight.copy_(grid.restored(numbers))
    return (save.awq_parts if recipe.method == "awq" else save.gptq_parts)(numbers, grid)


def _wanted(name: str, layer: nn.Module, recipe: Recipe) -> dict[str, Linear]:
    """The linears of a layer that are quantized: those that quantizing at load takes, if the groups divide them."""
    kind = "int4" if METHODS[recipe.method] == 4 else recipe.method
    return {
        key: module
        for key, module in layer.named_modules()
        if isinstance(module, Linear)
        and form_at_load(kind, f"{name}.{key}", module.inputs, False) is not None
        and (kind != "int4" or (module.inputs % recipe.group_size == 0 and module.outputs % 8 == 0))
    }
