"""Which modules of a tree an adapter's configuration means. Matches as PEFT does; knows no tensors.

Quire's module names are the Hugging Face paths, so PEFT's names and patterns mean the same here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from quire.errors import AdapterError, did_you_mean
from quire.layers.embedding import Embedding
from quire.layers.linear import Linear
from quire.layers.moe import MixtureOfExperts
from quire.lora.config import ALL_LINEAR, LoraConfig
from quire.models.decoder import CausalLM


def target_modules(config: LoraConfig, model: CausalLM) -> list[str]:
    """Paths of the linears and embeddings that get A and B, in the tree's order.

    Raises AdapterError where an entry names nothing, with a near name, or something that cannot have an adapter.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, (Linear, Embedding))]
    wanted = config.target_modules
    if wanted is None or wanted == ALL_LINEAR:
        never = {"lm_head", *_routers(model)}
        linears = [name for name in names if isinstance(model.get_submodule(name), Linear) and name not in never]
        found = [name for name in linears if _in_layers(config, name)]
    elif isinstance(wanted, str):
        found = [name for name in names if re.fullmatch(wanted, name)]
    else:
        _check_entries(wanted, names, model)
        found = [name for name in names if ends_with(name, wanted) and _in_layers(config, name)]
    found = [name for name in found if not excluded(config, name)]
    if not found and wanted != ():
        raise AdapterError(
            f"target_modules is {wanted!r}, which matches no linear layer of this model; there are {_leaves(names)}.",
            parameter="target_modules",
        )
    return found


def ends_with(name: str, entries: Iterable[str]) -> bool:
    """Whether the path is an entry or ends with a dot and an entry."""
    return any(name == entry or name.endswith(f".{entry}") for entry in entries)


def excluded(config: LoraConfig, name: str) -> bool:
    """Whether `exclude_modules` or `modules_to_save` keep a module from having A and B."""
    if isinstance(config.exclude_modules, str):
        if re.fullmatch(config.exclude_modules, name):
            return True
    elif config.exclude_modules and ends_with(name, config.exclude_modules):
        return True
    return any(re.match(rf"(^|.*\.){entry}($|\..*)", name) for entry in config.modules_to_save or ())


def _in_layers(config: LoraConfig, name: str) -> bool:
    """Whether `layers_to_transform` lets the module in: by the first number of its path, or that after `layers_pattern`."""
    if config.layers_to_transform is None:
        return True
    if not config.layers_pattern:
        match = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", name)
    else:
        found = (re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", name) for pattern in config.layers_pattern)
        match = next((one for one in found if one), None)
    return match is not None and int(match["index"]) in config.layers_to_transform


def _routers(model: CausalLM) -> set[str]:
    return {f"{name}.gate" for name, module in model.named_modules() if isinstance(module, MixtureOfExperts)}


def _check_entries(entries: Sequence[str], names: Sequence[str], model: CausalLM) -> None:
    for entry in entries:
        if any(ends_with(name, [entry]) for name in names):
            continue
        other = any(ends_with(name, [entry]) for name, _ in model.named_modules())
        reason = "is not a linear layer or embedding" if other else "is not in this model"
        leaves = _leaves(names)
        raise AdapterError(
            f"target_modules has {entry!r}, which {reason}.{did_you_mean(entry, leaves.split(', '))} There are {leaves}.",
            parameter="target_modules",
        )


def _leaves(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
