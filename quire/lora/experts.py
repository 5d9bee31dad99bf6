"""Adapters of mixtures of experts in the form of transformers 5, where all experts of a layer are one parameter.

PEFT then has one A [E * R, I] and one B [O, E * R] for the gate and up matrices of a layer's experts together, and one pair for
the down matrices. Here each expert's linears have their own, which is also what is written: PEFT turns this older form into the
other when it loads it. Only where a gate and an up matrix truly share an A the newer form is kept.

E experts, R rank, I inputs, O outputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quire.errors import AdapterError
from quire.layers.moe import MixtureOfExperts
from quire.lora.config import LoraConfig
from quire.lora.parts import ModulePart
from quire.models.decoder import CausalLM

FUSED = "|experts|"
GATE_UP, DOWN = "gate_up_proj", "down_proj"
# What gate, up and down are called in an expert of the tree.
LEAVES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


def leaves(expert: nn.Module) -> tuple[str, str, str]:
    return next(names for names in LEAVES if hasattr(expert, names[0]))


def place(path: str, model: CausalLM, renamed: Sequence[tuple[str, str]]) -> str | None:
    """`<experts of the tree>|experts|inner` or `...|outer` for a path that means all experts of a layer, else None."""
    inner = path.endswith(".base_layer")
    path = path.removesuffix(".base_layer")
    if not path.endswith(".experts"):
        return None
    for candidate in (path, *(path.replace(old, new) for old, new in renamed)):
        for name in model.checkpoint_names(f"{candidate}.weight"):
            name = name.removesuffix(".weight")
            if name in set(layers(model)):
                return f"{name}{FUSED}{'inner' if inner else 'outer'}"
    return None


def is_fused(path: str) -> bool:
    return FUSED in path


def layers(model: CausalLM) -> list[str]:
    """Paths of the lists of experts."""
    return [f"{name}.experts" for name, module in model.named_modules() if isinstance(module, MixtureOfExperts)]


def parameter_path(experts: str, parameter: str) -> str:
    """What transformers 5 calls all experts' matrices of one kind."""
    return f"{experts.replace('.block_sparse_moe.', '.mlp.')}.{parameter}"


def targets(config: LoraConfig, model: CausalLM) -> list[str]:
    """The experts' linears that `target_parameters` means."""
    found = []
    for experts in layers(model):
        module = model.get_submodule(experts)
        gate, up, down = leaves(module[0])
        for parameter, names in ((GATE_UP, (gate, up)), (DOWN, (down,))):
            if _targeted(config, parameter_path(experts, parameter)):
                found += [f"{experts}.{index}.{leaf}" for index in range(len(module)) for leaf in names]
    return found


def _targeted(config: LoraConfig, path: str) -> bool:
    return any(path == entry or path.endswith(f".{entry}") for entry in config.target_parameters or ())


def configured_path(name: str, config: LoraConfig, model: CausalLM) -> str:
    """The path by which the patterns know a linear: of an expert that `target_parameters` names, the parameter's."""
    path, _, rest = name.rpartition(".experts.")
    if not path or not config.target_parameters:
        return name
    experts, leaf = f"{path}.experts", rest.rpartition(".")[2]
    down = leaf == leaves(model.get_submodule(experts)[0])[2]
    parameter = parameter_path(experts, DOWN if down else GATE_UP)
    return parameter if _targeted(config, parameter) else name


def split(
    fused: Mapping[str, Mapping[str, Any]], config: LoraConfig, model: CausalLM
) -> tuple[LoraConfig, dict[str, ModulePart]]:
    """Parts of the single experts, and the configuration that names their linears instead of parameters."""
    if not targets(config, model):
        for kinds in fused.values():
            key = next(iter(kinds.values())).key
            message = f"tensor {key!r} is there, but target_parameters names no experts."
            raise AdapterError(message, parameter="target_parameters")
        return config, {}
    parts: dict[str, ModulePart] = {}
    for experts in layers(model):
        wanted = [name for name in (GATE_UP, DOWN) if _targeted(config, parameter_path(experts, name))]
        # With both, the gate and up matrices were wrapped first and are the inner one.
        sides = dict(zip(wanted, ("inner", "outer") if len(wanted) == 2 else ("outer",), strict=False))
        for parameter, side in sides.items():
            kinds = fused.get(f"{experts}{FUSED}{side}", {})
            if set(kinds) != {"a", "b"}:
                path = parameter_path(experts, parameter)
                message = f"A and B of {path} are missing, which target_parameters asks for."
                raise AdapterError(message, parameter="target_parameters")
            parts |= _of_layer(experts, parameter, kinds["a"], kinds["b"], config, model)
        for path, kinds in fused.items():
            if path.startswith(f"{experts}{FUSED}") and path.rpartition("|")[2] not in sides.values():
                key = next(iter(kinds.values())).key
                raise AdapterError(f"tensor {key!r} is not asked for.", parameter="target_parameters")
    shared = any(part.a is parts.get(sibling(name), part).a for name, part in parts.items() if sibling(name) != name)
    return (config if shared else named_by_modules(config, parts, model)), parts


def sibling(name: str) -> str:
    """The up matrix beside a gate matrix; any other name as it is."""
    path, _, leaf = name.rpartition(".")
    return next((f"{path}.{names[1]}" for names in LEAVES if leaf == names[0]), name)


def _of_layer(
    experts: str, parameter: str, a: Any, b: Any, config: LoraConfig, model: CausalLM
) -> dict[str, ModulePart]:
    module = model.get_submodule(experts)
    path, count = parameter_path(experts, parameter), len(module)
    rank, scale = config.rank_of(path), config.scale_of(path)
    gate, up, down = leaves(module[0])
    names = (gate, up) if parameter == GATE_UP else (down,)
    inputs = getattr(module[0], names[0]).inputs
    outputs = [getattr(module[0], name).outputs for name in names]
    for stored, shape in ((a, (count * rank, inputs)), (b, (sum(outputs), count * rank))):
        if tuple(stored.tensor.shape) != shape:
            raise AdapterError(
                f"tensor {stored.key!r} has shape {list(stored.tensor.shape)}; expected {list(shape)} "
                f"({count} experts, rank {rank} by r and rank_pattern)."
            )
    each_a = a.tensor.float().view(count, rank, inputs)
    each_b = b.tensor.float().view(sum(outputs), rank, count).permute(2, 1, 0)  # [E, R, O]
    halves = _halves(each_b, outputs)
    parts = {}
    for index in range(count):
        shared = each_a[index].contiguous()
        start = 0
        for which, (name, size) in enumerate(zip(names, outputs, strict=True)):
            ranks = slice(None) if halves is None else halves[which]
            one_a = shared if halves is None else shared[ranks].contiguous()
            one_b = each_b[index, ranks, start : start + size].contiguous()
            parts[f"{experts}.{index}.{name}"] = ModulePart(one_a, one_b, scale)
            start += size
    return parts


def _halves(each_b: Tensor, outputs: Sequence[int]) -> tuple[slice, slice] | None:
    """Which ranks are the gate's and which the up matrix's, where the pair was made of two: the rest of B is then zero."""
    rank = each_b.shape[1]
    if len(outputs) != 2 or rank % 2:
        return None
    first, second = slice(0, rank // 2), slice(rank // 2, rank)
    apart = not each_b[:, second, : outputs[0]].any() and not each_b[:, first, outputs[0] :].any()
    return (first, second) if apart and each_b.any() else None


def named_by_modules(config: LoraConfig, parts: Mapping[str, ModulePart], model: CausalLM) -> LoraConfig:
    """The configuration with the experts' linears in target_modules and their ranks and alphas in the patterns."""
    named = {leaf for experts in layers(model) for leaf in leaves(model.get_submodule(experts)[0])}
    used = sorted({name.rpartition(".")[2] for name in parts} & named)
    ranks, alphas = dict(config.rank_pattern), dict(config.alpha_pattern)
    for pattern in (ranks, alphas):
        for key in [key for key in pattern if key.endswith((GATE_UP, rf"\.{DOWN}")) or key == DOWN]:
            del pattern[key]
    for leaf in used:
        part = next(part for name, part in parts.items() if name.endswith(f".{leaf}"))
        alpha = part.scale * (part.rank**0.5 if config.use_rslora else part.rank)
        key = rf"experts\.\d+\.{leaf}"
        if part.rank != config.r:
            ranks[key] = part.rank
        if abs(alpha - config.lora_alpha) > 1e-9 * abs(alpha):
            alphas[key] = round(alpha, 9)
    others = config.target_modules if isinstance(config.target_modules, tuple) else ()
    names: Iterable[str] = dict.fromkeys((*others, *used))
    rest = tuple(name for name in config.target_parameters or () if name.rpartition(".")[2] not in (GATE_UP, DOWN)) or None
    return replace(config, target_modules=tuple(names), target_parameters=rest, rank_pattern=ranks, alpha_pattern=alphas)


def fused(parts: Mapping[str, ModulePart], config: LoraConfig) -> tuple[dict[str, Tensor], dict[str, ModulePart]]:
    """The tensors of the experts named by `target_parameters`, in transformers 5's form, by path and ending; and the parts
    that are not among them."""
    rest = dict(parts)
    lists: dict[str, dict[int, dict[str, ModulePart]]] = {}
    for name, part in parts.items():
        experts, _, place = name.rpartition(".experts.")
        if experts:
            index, _, leaf = place.partition(".")
            lists.setdefault(f"{experts}.experts", {}).setdefault(int(index), {})[leaf] = part
    tensors: dict[str, Tensor] = {}
    for experts, by_index in lists.items():
        names = next(names for names in LEAVES if set(names) & set(by_index[0]))
        pairs = {GATE_UP: names[:2], DOWN: names[2:]}
        wanted = [name for name in (GATE_UP, DOWN) if _targeted(config, parameter_path(experts, name))]
        for parameter in wanted:
            rows = [[by_index[index][leaf] for leaf in pairs[parameter]] for index in range(len(by_index))]
            for index, leaf in itertools.product(by_index, pairs[parameter]):
                del rest[f"{experts}.{index}.{leaf}"]
            nested = ".base_layer" if parameter == GATE_UP and len(wanted) == 2 else ""
            path = f"{parameter_path(experts, '')}".rstrip(".") + nested
            tensors[f"{path}.lora_A.weight"] = torch.cat([row[0].a for row in rows])
            each_b = torch.stack([torch.cat([part.b for part in row], dim=1) for row in rows])  # [E, R, O]
            tensors[f"{path}.lora_B.weight"] = each_b.permute(2, 1, 0).flatten(1)
    return tensors, rest
