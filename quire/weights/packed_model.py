"""A model's weights as one file's tensors, and back: packed linears with their scales, and the parameters that stay dense."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from quire.log import logger
from quire.models.decoder import CausalLM
from quire.quant.packing import Packing, linear_from_parts, packed_weights, parts_of, stores_packed
from quire.weights.packed_cache import PackedCache
from quire.weights.packed_file import Damaged, Place, places
from quire.weights.tensors import TYPES

log = logger(__name__)

NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in TYPES.values()}
SECONDS_AT_EXIT = 20.0
"""For a file that is being written when the program ends."""


def restore(model: CausalLM, packing: Packing, cache: PackedCache) -> bool:
    """Fill `model` (built on the meta device) from the cache; False if there is nothing for it, and the model is as it was."""
    found = cache.fetch() if stores_packed() else None
    if found is None:
        return False
    try:
        parameters, packed = _tensors(*found)
        _check(model, parameters, packed)
        weights = {name: linear_from_parts(packing.linears[name], *parts) for name, parts in packed.items()}
    except (Damaged, KeyError, TypeError, ValueError) as error:
        cache.refuse(error)
        return False
    for name, weight in weights.items():
        packing.set_packed(packing.linears[name], weight)
    for name, tensor in parameters.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))
    if packing.tied and model.table.format is None:
        model.lm_head.weight = model.table.weight
    log.info("Weights come packed from %s", cache.folder)
    return True


Parts = tuple[Mapping[str, int], dict[str, Tensor]]


def _tensors(facts: Mapping[str, Any], memory: Any) -> tuple[dict[str, Tensor], dict[str, Parts]]:
    """(parameters, parts of the packed linears) by name."""
    described = [tensor for entry in facts["entries"] for tensor in entry["tensors"]]
    sizes = [NAMES[dtype].itemsize * torch.Size(shape).numel() for _, dtype, shape in described]
    laid = iter(places(sizes))
    parameters: dict[str, Tensor] = {}
    packed: dict[str, Parts] = {}
    for entry in facts["entries"]:
        tensors = {leaf: _tensor(memory, next(laid), NAMES[dtype], shape) for leaf, dtype, shape in entry["tensors"]}
        if entry["packed"] is None:
            parameters[entry["name"]] = tensors["values"]
        else:
            packed[entry["name"]] = entry["packed"], tensors
    return parameters, packed


def _tensor(memory: Any, place: Place, dtype: torch.dtype, shape: list[int]) -> Tensor:
    if place.start + place.size > len(memory):
        raise Damaged("its tensors are longer than it is")
    if not place.size:
        return torch.empty(shape, dtype=dtype)
    raw = torch.frombuffer(memory, dtype=torch.uint8, count=place.size, offset=place.start)
    return raw.view(dtype).view(shape)


def _check(model: CausalLM, parameters: Mapping[str, Tensor], packed: Mapping[str, Parts]) -> None:
    """Every place has its weight and every weight its place."""
    wanted = {name: tuple(value.shape) for name, value in model.named_parameters()}
    taken = {f"{name}.weight" for name in packed}
    if "lm_head" in packed and model.config.tie_word_embeddings:
        taken |= {name for name, value in model.named_parameters() if value is model.table.weight}
    expected = {name: shape for name, shape in wanted.items() if name not in taken}
    given = {name: tuple(value.shape) for name, value in parameters.items()}
    if given != expected:
        raise Damaged(f"it is of another model: {', '.join(sorted({*given} ^ {*expected})[:3]) or 'other shapes'}")


def keep(model: CausalLM, cache: PackedCache) -> None:
    """Write the weights for the next start, beside what the program does meanwhile."""
    if not stores_packed():
        log.info("packed weights are not kept: these operations have none of their own")
        return
    entries, tensors = [], []
    for name, facts, parts in chain(_packed(model), _dense(model)):
        described = [(leaf, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for leaf, tensor in parts.items()]
        entries.append({"name": name, "packed": facts, "tensors": described})
        tensors += [memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) for tensor in parts.values()]
    # A thread that does not outlive the program, for which the program waits a while.
    writer = threading.Thread(target=cache.keep, args=({"entries": entries}, tensors), name="quire-keep", daemon=True)
    writer.start()
    atexit.register(writer.join, SECONDS_AT_EXIT)


def _packed(model: CausalLM) -> Iterator[tuple[str, Mapping[str, int], dict[str, Tensor]]]:
    for name, weight in packed_weights(model).items():
        yield name, *parts_of(weight)


def _dense(model: CausalLM) -> Iterator[tuple[str, None, dict[str, Tensor]]]:
    for name, value in model.named_parameters():
        yield name, None, {"values": value.detach()}
