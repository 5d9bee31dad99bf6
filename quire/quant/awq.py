"""AWQ (Lin et al. 2023): inputs that are large get finer weights, by a scale that is folded into what comes before.

x W^T = (x / s) (W s)^T, with s = |x|^a / |w|^(1 - a); a is searched for each set of linears that share an input. The loss is
the error of the linears' own outputs, calculated from their inputs' gram matrix. Which part of a layer comes before which
linear is the one thing here that depends on families: the table FOLDS.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quire.layers.linear import Linear
from quire.layers.moe import MixtureOfExperts
from quire.quant.calibrate import Inputs
from quire.quant.grid import Grid, fitted_grid, output_error, plain_grid

EXPONENTS = tuple(step / 20 for step in range(20))
LEAST_SCALE = 1e-4
# (what is divided by the scale, linears that are multiplied with it), by their names in a layer.
FOLDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("input_layernorm", ("self_attn.qkv_proj",)),
    ("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("self_attn.v_proj", ("self_attn.o_proj",)),
    ("self_attn.v_proj", ("self_attn.out_proj",)),
    ("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("post_attention_layernorm", ("mlp.gate_up_proj",)),
    ("mlp.up_proj", ("mlp.down_proj",)),
    ("final_layer_norm", ("fc1",)),
    ("ln_1", ("attn.c_attn",)),
    ("ln_2", ("mlp.c_fc",)),
)
EXPERT_FOLDS = (("up_proj", "down_proj"), ("w3", "w2"))


@dataclass(frozen=True)
class Fold:
    """source: a norm or a linear. linears: by name in the layer. routers: dense linears that read the same input."""

    source: nn.Module
    linears: Mapping[str, Linear]
    routers: tuple[Linear, ...] = ()


def folds_of(layer: nn.Module) -> Iterator[Fold]:
    """The places of a layer where a scale can be folded."""
    modules = dict(layer.named_modules())
    norm_first = getattr(layer, "norm_first", True)
    for source, targets in FOLDS:
        if source not in modules or any(target not in modules for target in targets):
            continue
        if source == "post_attention_layernorm" and "pre_feedforward_layernorm" in modules:
            continue  # Gemma's is behind the attention, not before the feed-forward layer
        if source.endswith("norm") and not norm_first:
            continue
        linears = {target: modules[target] for target in targets}
        if _fits(modules[source], linears.values()):
            yield Fold(modules[source], linears)
    for name, module in modules.items():
        if isinstance(module, MixtureOfExperts):
            yield from _folds_of_experts(name, module, modules)


def _folds_of_experts(name: str, moe: MixtureOfExperts, modules: Mapping[str, nn.Module]) -> Iterator[Fold]:
    below = f"{name}.experts."
    inside = {key: module for key, module in modules.items() if key.startswith(below) and isinstance(module, Linear)}
    last = tuple(target for _, target in EXPERT_FOLDS)
    first = {key: module for key, module in inside.items() if not key.endswith(last)}
    yield Fold(modules["post_attention_layernorm"], first, (moe.gate,))
    for source, target in EXPERT_FOLDS:
        for key, module in inside.items():
            if key.endswith(f".{target}"):
                yield Fold(modules[f"{key.removesuffix(target)}{source}"], {key: module})


def _fits(source: nn.Module, linears: Iterable[Linear]) -> bool:
    widths = {linear.inputs for linear in linears}
    if isinstance(source, Linear):
        return widths == {source.outputs}  # not where several query heads share a value head
    return getattr(source, "weight", None) is not None


def fold_scales(layer: nn.Module, inputs: Mapping[str, Inputs], sizes: Mapping[str, int | None], symmetric: bool) -> None:
    """Search the scales of a layer and fold them in, in place. sizes: group size of each linear, None where it stays dense."""
    for fold in folds_of(layer):
        named = {name: linear for name, linear in fold.linears.items() if sizes.get(name) and inputs[name].count}
        if len(named) < len(fold.linears) and not fold.routers:
            continue
        if not named:
            continue
        scale = best_scale(
            [linear.weight.float() for linear in named.values()],
            [inputs[name] for name in named],
            [sizes[name] for name in named],
            symmetric,
        )
        _divide(fold.source, scale)
        for linear in (*fold.linears.values(), *fold.routers):
            linear.weight.copy_(linear.weight.float() * scale)
        for name in fold.linears:
            seen = inputs[name]
            seen.gram /= scale[:, None] * scale
            seen.sizes /= scale


def best_scale(weights: Sequence[Tensor], inputs: Sequence[Inputs], sizes: Sequence[int | None], symmetric: bool) -> Tensor:
    """The scale [I] with which rounding errs least, for weights [O, I] that read the same channels.

    Each linear's error counts as a part of its output, so that large scores do not outvote small values.
    """
    seen = sum(one.sizes for one in inputs) / max(1, sum(one.count for one in inputs))
    usual = torch.cat([_within_groups(weight, size) for weight, size in zip(weights, sizes, strict=True)]).mean(0)
    outputs = [max(output_error(weight, one.gram), 1e-30) for weight, one in zip(weights, inputs, strict=True)]
    best, least = torch.ones_like(seen), float("inf")
    for exponent in EXPONENTS:
        scale = seen.clamp_min(1e-8).pow(exponent) / usual.clamp_min(LEAST_SCALE).pow(1 - exponent)
        scale = scale.clamp_min(LEAST_SCALE)
        scale = scale / (scale.max() * scale.min()).sqrt()
        loss = 0.0
        for weight, one, size, output in zip(weights, inputs, sizes, outputs, strict=True):
            scaled = weight * scale
            error = plain_grid(scaled, size, symmetric).nearest(scaled) / scale - weight
            loss += output_error(error, one.gram) / output
        if loss < least:
            best, least = scale, loss
    return best


def _within_groups(weight: Tensor, size: int | None) -> Tensor:
    """Sizes of numbers as parts of the largest of their group: where they are small, a scale may grow for free."""
    grouped = weight.view(len(weight), -1, size or weight.shape[1]).abs()
    return (grouped / grouped.amax(-1, keepdim=True).clamp_min(1e-12)).view_as(weight)


def rounded(weight: Tensor, gram: Tensor, size: int, symmetric: bool) -> tuple[Tensor, Grid]:
    """(numbers 0 to 15 as float32 [O, I], their grid) of a weight that already has its scales."""
    grid = fitted_grid(weight, gram, size, symmetric) if gram.any() else plain_grid(weight, size, symmetric)
    return grid.rounded(weight), grid


def _divide(source: nn.Module, scale: Tensor) -> None:
    if isinstance(source, Linear):
        source.weight.copy_(source.weight.float() / scale[:, None])
    else:
        offset = getattr(source, "offset", 0.0)
        source.weight.copy_((source.weight.float() + offset) / scale - offset)
    if getattr(source, "bias", None) is not None:
        source.bias.copy_(source.bias.float() / scale)
