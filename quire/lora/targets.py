"""Which modules of a tree an adapter's configuration means. Matches as PEFT does; knows no tensors.

Quire's module names are the Hugging Face paths, so PEFT's names and patterns mean the same here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from quire.errors import AdapterError, did_you_mean
from quire.layers.embedding import Embedding
from quire.layers.linear import Linear
from quire.layers.moe import MixtureOfExperts
from quire.lora import experts
from quire.lora.base import kept_modules, written_name
from quire.lora.config import ALL_LINEAR, LoraConfig
from quire.models.decoder import CausalLM


def target_modules(config: LoraConfig, model: CausalLM) -> list[str]:
    """Paths of the linears and embeddings that get A and B, in the tree's order.

    Raises AdapterError where an entry names nothing, with a near name, or something that cannot have an adapter.
    """
    names = adaptable(model)
    wanted = config.target_modules
    if wanted == ALL_LINEAR or (wanted is None and not config.target_parameters):
        never = {"lm_head", *_routers(model)}
        linears = [name for name in names if isinstance(model.get_submodule(name), Linear) and name not in never]
        found = [name for name in linears if _in_layers(config, name)]
    elif isinstance(wanted, str):
        found = [name for name in names if any(re.fullmatch(wanted, path) for path in _paths(model, name))]
    else:
        _check_entries(wanted or (), names, model, "target_modules")
        # As in PEFT, a module that is named by its whole path is in whatever its layer.
        listed = wanted or ()
        whole = {name for name in names if any(path in listed for path in _paths(model, name))}
        found = [name for name in names if name in whole or (ends_with(name, listed) and _in_layers(config, name))]
    found = [name for name in found if not any(excluded(config, path) for path in _paths(model, name))]
    if not found and wanted:
        raise AdapterError(
            f"target_modules is {wanted!r}, which matches no linear layer of this model; there are {_leaves(names)}.",
            parameter="target_modules",
        )
    if tied(config, model) and table_name(model) in found:
        found.append("lm_head")
    found += _parameters(config, model, names)
    return list(dict.fromkeys(found))


def _paths(model: CausalLM, name: str) -> tuple[str, ...]:
    """What a module is called: here, and by transformers, where that differs."""
    return tuple(dict.fromkeys((name, written_name(model, name))))


def table_name(model: CausalLM) -> str:
    """The path of the token table."""
    return next(name for name, module in model.named_modules() if module is model.table)


def tied(config: LoraConfig, model: CausalLM) -> bool:
    """Whether what an adapter does to the token table it does to the head too."""
    return config.ensure_weight_tying and model.config.tie_word_embeddings


def adaptable(model: CausalLM) -> list[str]:
    """Paths of all linears and embeddings."""
    return [name for name, module in model.named_modules() if isinstance(module, (Linear, Embedding))]


def _parameters(config: LoraConfig, model: CausalLM, names: Sequence[str]) -> list[str]:
    """The linears that `target_parameters` means: those of a layer's experts, and `<module>.weight`."""
    if not config.target_parameters:
        return []
    found = experts.targets(config, model)
    weights = [f"{name}.weight" for name in names]
    found += [name.removesuffix(".weight") for name in weights if ends_with(name, config.target_parameters)]
    if not found:
        raise AdapterError(
            f"target_parameters is {list(config.target_parameters)}, which matches no parameter that can have an adapter.",
            parameter="target_parameters",
        )
    return found


def named_one_by_one(config: LoraConfig, model: CausalLM) -> LoraConfig:
    """The configuration with the shortest list in place of "all-linear" that means the same modules."""
    if config.target_modules not in (None, ALL_LINEAR):
        return config
    found = target_modules(config, model)
    for parts in (1, 2, 3):
        entries = tuple(sorted({".".join(name.split(".")[-parts:]) for name in found}))
        shorter = replace(config, target_modules=entries)
        if target_modules(shorter, model) == found:
            return shorter
    found = [written_name(model, name) for name in found]
    return replace(config, target_modules=tuple(found), layers_to_transform=None, layers_pattern=None, exclude_modules=None)


def saved_modules(config: LoraConfig, model: CausalLM) -> list[str]:
    """The modules that `modules_to_save` replaces whole. Raises AdapterError for unknown names and kinds that are not kept."""
    found: dict[str, None] = {}
    paths, kept = dict(model.named_modules()), kept_modules(model)
    for entry in config.modules_to_save or ():
        roots = [path for path in paths if path and path.endswith(entry)]
        if not roots:
            near = did_you_mean(entry, {path.rpartition(".")[2] for path in paths})
            raise AdapterError(f"modules_to_save has {entry!r}, which is not in this model.{near}", parameter="modules_to_save")
        for path, module in paths.items():
            if not any(path == root or path.startswith(f"{root}.") for root in roots):
                continue
            if path in kept:
                found[path] = None
            elif next(module.parameters(recurse=False), None) is not None:
                raise AdapterError(
                    f"modules_to_save has {entry!r}: {path} is a {type(module).__name__}; only linear layers, "
                    "embeddings and norms are kept for each adapter.",
                    parameter="modules_to_save",
                )
    if tied(config, model) and table_name(model) in found:
        found["lm_head"] = None
    return list(found)


def token_modules(config: LoraConfig, model: CausalLM) -> dict[str, tuple[int, ...]]:
    """The token ids of `trainable_token_indices` by module; a head that is tied to the table has them too."""
    wanted = config.trainable_token_indices
    if not wanted:
        return {}
    table = table_name(model)
    found: dict[str, tuple[int, ...]] = {}
    for entry, ids in (wanted.items() if isinstance(wanted, Mapping) else [(table, wanted)]):
        names = [name for name in (table, "lm_head") if ends_with(name, [entry])]
        size = model.config.vocab_size
        wrong = [token for token in ids if token >= size]
        if not names or wrong or len(set(ids)) < len(ids):
            problem = f"{wrong[0]} is not below the vocabulary's {size}" if wrong else "an id is there twice"
            problem = problem if names else f"{entry!r} is neither {table!r} nor 'lm_head'"
            raise AdapterError(f"trainable_token_indices: {problem}.", parameter="trainable_token_indices")
        found[names[0]] = tuple(ids)
    if model.config.tie_word_embeddings and table in found:
        found.setdefault("lm_head", found[table])
    return found


def biased_modules(config: LoraConfig, model: CausalLM, targets: Iterable[str]) -> list[str]:
    """The modules whose bias the adapter has its own of: linears, and by "all" norms too."""
    if config.bias == "none":
        return []
    biased = [name for name, module in kept_modules(model).items() if getattr(module, "bias", None) is not None]
    if config.bias == "all":
        return biased
    wanted = set(targets)
    return [name for name in biased if name in wanted]


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


def _check_entries(entries: Sequence[str], names: Sequence[str], model: CausalLM, field: str) -> None:
    written = [written_name(model, name) for name in names]
    for entry in entries:
        if any(ends_with(name, [entry]) for name in (*names, *written)):
            continue
        other = any(ends_with(name, [entry]) for name, _ in model.named_modules())
        reason = "is not a linear layer or embedding" if other else "is not in this model"
        leaves = _leaves(names)
        raise AdapterError(
            f"{field} has {entry!r}, which {reason}.{did_you_mean(entry, leaves.split(', '))} There are {leaves}.",
            parameter=field,
        )


def _leaves(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
