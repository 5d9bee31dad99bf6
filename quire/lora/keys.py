"""PEFT's tensor names: from an adapter's tensors to the parts of its modules, and back.

Reading places every tensor or says which one does not fit; a module has all its tensors or it is an error. Experts are read in
both forms, one matrix pair for each (as written here), or all of a layer's in one (transformers 5).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quire.errors import AdapterError, did_you_mean
from quire.layers.embedding import Embedding
from quire.layers.linear import Linear
from quire.layers.norm import Norm
from quire.lora import experts
from quire.lora.base import dense_rows, kept_modules, sizes, written_name
from quire.lora.config import LoraConfig
from quire.lora.parts import ModulePart
from quire.lora.targets import biased_modules, saved_modules, table_name, target_modules, tied, token_modules
from quire.models.decoder import CausalLM

PREFIX = "base_model.model."
# How a key ends, and what it holds; longer endings first.
ENDINGS = {
    ".token_adapter.trainable_tokens_delta": "tokens",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".base_layer.weight": "base",
    ".base_layer.bias": "bias",
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "b_bias",
    ".weight": "weight",
    ".bias": "bias",
}
# Where the tree keeps an older name of a module that transformers has renamed.
RENAMED = ((".mlp.", ".block_sparse_moe."),)
# A stored table this close to the base's is the base's (that may be quantized).
SAME_TABLE = 0.05


@dataclass(frozen=True)
class Stored:
    """A tensor with the key that it had in its file."""

    key: str
    tensor: Tensor


Found = dict[str, dict[str, Stored]]


def parts_of(tensors: Mapping[str, Tensor], config: LoraConfig, model: CausalLM) -> tuple[LoraConfig, dict[str, ModulePart]]:
    """The parts by module, sorted, and the configuration in terms of these modules.

    Raises AdapterError for keys that are unknown, missing, of another shape or not finite.
    """
    found = _placed(_without_copies(tensors), model)
    fused = {path: kinds for path, kinds in found.items() if experts.is_fused(path)}
    for path in fused:
        del found[path]
    _check_kinds(found, config)
    config, parts = experts.split(fused, config, model)
    tokens = token_modules(config, model)
    for name in sorted(found):
        if name in parts:
            key = next(iter(found[name].values())).key
            raise AdapterError(f"tensor {key!r} is there twice: by itself and with all experts of its layer.")
        parts[name] = _part(name, found[name], config, model, tokens.get(name, ()))
    share_tokens(parts, tokens, model)
    if tied(config, model):
        _share_with_head(parts, table_name(model))
    _check_complete(parts, config, model)
    return config, dict(sorted(parts.items()))


def _without_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what PEFT writes a second time where `bias` is "all" and a module in `modules_to_save` has a bias: the base's
    own, and the saved one under the name that it has in PEFT's tree."""
    copies = (".original_module.bias", ".modules_to_save.bias")
    return {
        key: tensor
        for key, tensor in tensors.items()
        if not any(key.endswith(copy) and f"{key.removesuffix(copy)}.bias" in tensors for copy in copies)
    }


def _placed(tensors: Mapping[str, Tensor], model: CausalLM) -> Found:
    """Tensors by module (or by path, where a layer's experts are in one) and kind."""
    modules = set(kept_modules(model))
    found: Found = {}
    for key, tensor in tensors.items():
        ending = next((ending for ending in ENDINGS if key.endswith(ending)), None)
        if ending is None or not key.startswith(PREFIX):
            raise AdapterError(f"tensor {key!r} is not one of LoRA's; expected {PREFIX}<module>.lora_A.weight and the like.")
        path, kind = key.removeprefix(PREFIX).removesuffix(ending), ENDINGS[ending]
        if kind in ("a", "b") and (place := experts.place(path, model, RENAMED)) is not None:
            path = place
        else:
            path = _module(path, modules, model, key)
        if kind in found.setdefault(path, {}):
            raise AdapterError(f"tensors {found[path][kind].key!r} and {key!r} are for the same place.")
        if not tensor.is_floating_point():
            raise AdapterError(f"tensor {key!r} is of type {tensor.dtype}; expected floating point numbers.")
        if not torch.isfinite(tensor.float()).all():
            raise AdapterError(f"tensor {key!r} has numbers that are not finite (NaN or infinity).")
        found[path][kind] = Stored(key, tensor)
    return found


def _module(path: str, modules: set[str], model: CausalLM, key: str) -> str:
    """The module of the tree that a path of the file means."""
    for renamed in (path, *(path.replace(old, new) for old, new in RENAMED)):
        for candidate in model.checkpoint_names(f"{renamed}.weight"):
            name = candidate.removesuffix(".weight")
            if name in modules:
                return name
    if any(name == path for name, _ in model.named_modules()):
        kind = type(model.get_submodule(path)).__name__
        raise AdapterError(
            f"tensor {key!r} is for a {kind}; only linear layers, embeddings and norms are kept for each adapter."
        )
    raise AdapterError(f"tensor {key!r} is for {path!r}, which this model does not have.{did_you_mean(path, modules)}")


def _check_kinds(found: Found, config: LoraConfig) -> None:
    """Whether the configuration speaks of each kind of tensor that is there."""
    asked = {"magnitude": config.use_dora, "b_bias": config.lora_bias, "tokens": bool(config.trainable_token_indices)}
    fields = {"magnitude": "use_dora", "b_bias": "lora_bias", "tokens": "trainable_token_indices"}
    for kinds in found.values():
        for kind, stored in kinds.items():
            if not asked.get(kind, True):
                raise AdapterError(
                    f"tensor {stored.key!r} is there, but adapter_config.json does not set {fields[kind]}.",
                    parameter=fields[kind],
                )


def share_tokens(parts: dict[str, ModulePart], tokens: Mapping[str, tuple[int, ...]], model: CausalLM) -> None:
    """A tied head has the tokens of the table."""
    table = next((parts[name] for name in tokens if name != "lm_head" and name in parts), None)
    if model.config.tie_word_embeddings and table is not None and table.tokens is not None:
        head = parts.get("lm_head", ModulePart())
        if head.tokens is None:
            parts["lm_head"] = replace(head, tokens=table.tokens, token_ids=table.token_ids)


def _share_with_head(parts: dict[str, ModulePart], table: str) -> None:
    """What a tied head has of the table's under names of its own is the table's, so that it trains as one."""
    one, head = parts.get(table), parts.get("lm_head")
    if one is None or head is None:
        return
    for field, other in (("weight", one.weight), ("a", one.b), ("b", one.a)):
        stored = getattr(head, field)
        if other is not None and stored is not None:
            if not torch.equal(stored, other):
                raise AdapterError(f"ensure_weight_tying: lm_head and {table} differ.", parameter="ensure_weight_tying")
            head = replace(head, **{field: other})
    parts["lm_head"] = head


def _part(
    name: str, kinds: Mapping[str, Stored], config: LoraConfig, model: CausalLM, tokens: tuple[int, ...]
) -> ModulePart:
    module = model.get_submodule(name)
    if isinstance(module, Norm):
        return _norm_part(name, module, kinds)
    inputs, outputs = sizes(model, module)
    path = written_name(model, name)
    embedding, rank = isinstance(module, Embedding), config.rank_of(path)
    a, b = ("embedding_a", "embedding_b") if embedding else ("a", "b")
    shapes = {
        a: (rank, inputs),
        b: (outputs, rank),
        "b_bias": (outputs,),
        "magnitude": (outputs,),
        "bias": (outputs,),
        "weight": (inputs, outputs) if embedding else (outputs, inputs),
        "tokens": (len(tokens), outputs if embedding else inputs),
    }
    shapes["base"] = shapes["weight"]
    values: dict[str, Tensor] = {}
    for kind, stored in kinds.items():
        tensor = stored.tensor
        if kind == "weight":
            tensor = model.convert(f"{name}.weight", tensor)
        if kind == "bias" and not embedding and module.bias is None:
            raise AdapterError(f"tensor {stored.key!r} is a bias, but the base's {name} has none.")
        if kind not in shapes:
            raise AdapterError(f"tensor {stored.key!r} does not belong to {'an embedding' if embedding else 'a linear layer'}.")
        if tuple(tensor.shape) != shapes[kind]:
            raise AdapterError(_shape_error(stored.key, tensor, shapes[kind], kind, rank))
        values[kind] = tensor.float().contiguous()
    for one, other in ((a, b), (b, a)):
        if one in values and other not in values:
            raise AdapterError(f"tensor {kinds[one].key!r} is there without its {'B' if other == b else 'A'}.")
    weight = values.get("weight")
    if "base" in values and not _is_base(values["base"], module):
        weight = values["base"]
    return ModulePart(
        a=values.get(a),
        b=values[b].t().contiguous() if b in values else None,
        scale=config.scale_of(path) if a in values else 1.0,
        b_bias=values.get("b_bias"),
        magnitude=values.get("magnitude"),
        bias=values.get("bias"),
        weight=weight,
        tokens=values.get("tokens"),
        token_ids=tokens if "tokens" in values else (),
        embedding=embedding,
    )


def _norm_part(name: str, module: Norm, kinds: Mapping[str, Stored]) -> ModulePart:
    """A norm's weight and bias; there is nothing else that it can have."""
    shape = tuple(module.weight.shape)
    for kind, stored in kinds.items():
        if kind not in ("weight", "bias"):
            raise AdapterError(f"tensor {stored.key!r} does not belong to a norm, which has a weight and a bias at most.")
        if kind == "bias" and module.bias is None:
            raise AdapterError(f"tensor {stored.key!r} is a bias, but the base's {name} has none.")
        if tuple(stored.tensor.shape) != shape:
            raise AdapterError(_shape_error(stored.key, stored.tensor, shape, kind, 0))
    return ModulePart(**{kind: stored.tensor.float().contiguous() for kind, stored in kinds.items()})


def _shape_error(key: str, tensor: Tensor, shape: tuple[int, ...], kind: str, rank: int) -> str:
    message = f"tensor {key!r} has shape {list(tensor.shape)}; expected {list(shape)}"
    if kind in ("a", "b", "embedding_a", "embedding_b"):
        message += f" (rank {rank} by r and rank_pattern)"
    if kind in ("base", "embedding_a", "weight") and "embed" in key:
        message += "; an adapter whose vocabulary was resized needs a base of that size"
    return message + ". Is this the adapter's base model?"


def _is_base(table: Tensor, module: Linear | Embedding) -> bool:
    """Whether the table that PEFT stores beside A and B of an embedding or head is the base's own."""
    if module.weight is not None and module.weight.is_meta:
        return True
    dense = module.weight is not None
    for start in range(0, len(table), 4096):
        rows = dense_rows(module, start, min(start + 4096, len(table)))
        there = table[start : start + 4096]
        if dense and not torch.equal(there.to(module.weight.dtype).float(), rows):
            return False
        if not dense and (there - rows).norm() > SAME_TABLE * there.norm():
            return False
    return True


def _check_complete(parts: Mapping[str, ModulePart], config: LoraConfig, model: CausalLM) -> None:
    """Whether everything that the configuration asks for is there, and nothing else."""

    def missing(name: str, ending: str, field: str) -> AdapterError:
        return AdapterError(f"tensor '{PREFIX}{name}{ending}' is missing, which {field} asks for.", parameter=field)

    if config.target_modules is None and not config.target_parameters:
        targets = {name for name, part in parts.items() if part.a is not None}
    else:
        targets = set(target_modules(config, model))
    for name in sorted(targets):
        part = parts.get(name)
        embedding = isinstance(model.get_submodule(name), Embedding)
        if part is None or part.a is None:
            raise missing(name, ".lora_embedding_A" if embedding else ".lora_A.weight", "target_modules")
        if config.use_dora and part.magnitude is None:
            raise missing(name, ".lora_magnitude_vector", "use_dora")
        if config.lora_bias and part.b_bias is None and not embedding:
            raise missing(name, ".lora_B.bias", "lora_bias")
    wholes, tokens = set(saved_modules(config, model)), token_modules(config, model)
    for name in sorted(wholes):
        if name not in parts or parts[name].weight is None:
            raise missing(name, ".weight", "modules_to_save")
        if getattr(model.get_submodule(name), "bias", None) is not None and parts[name].bias is None:
            raise missing(name, ".bias", "modules_to_save")
    for name in tokens:
        if name not in parts or parts[name].tokens is None:
            raise missing(name, ".token_adapter.trainable_tokens_delta", "trainable_token_indices")
    biased = set(biased_modules(config, model, targets))
    for name in sorted(biased):
        if name not in parts or parts[name].bias is None:
            raise missing(name, ".base_layer.bias" if name in targets else ".bias", "bias")
    for name, part in parts.items():
        if part.a is not None and name not in targets:
            raise AdapterError(f"{name} has A and B, but target_modules does not name it.", parameter="target_modules")
        if part.weight is not None and name not in wholes and part.a is None:
            raise AdapterError(f"{name} has a weight, but modules_to_save does not name it.", parameter="modules_to_save")
        if part.bias is not None and name not in biased | wholes:
            raise AdapterError(f"{name} has a bias, but bias is {config.bias!r}.", parameter="bias")


def tensors_of(
    parts: Mapping[str, ModulePart], config: LoraConfig, written_as: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """The tensors as PEFT names and shapes them. written_as: modules that it does not call as the tree does."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    if config.target_parameters:
        fused, parts = experts.fused(parts, config)
        tensors = {f"{PREFIX}{key}": tensor for key, tensor in fused.items()}
    # The head last: tokens that it shares with the table are written once, as the table's.
    for name, part in sorted(parts.items(), key=lambda item: (item[0] == "lm_head", item[0])):
        path = PREFIX + (written_as or {}).get(name, name)
        if part.a is not None:
            a, b = (".lora_embedding_A", ".lora_embedding_B") if part.embedding else (".lora_A.weight", ".lora_B.weight")
            tensors[path + a], tensors[path + b] = part.a, part.b.t()
        if part.b_bias is not None:
            tensors[f"{path}.lora_B.bias"] = part.b_bias
        if part.magnitude is not None:
            tensors[f"{path}.lora_magnitude_vector"] = part.magnitude
        if part.bias is not None:
            tensors[f"{path}.base_layer.bias" if part.a is not None else f"{path}.bias"] = part.bias
        if part.weight is not None:
            turned = config.fan_in_fan_out and not part.embedding and name != "lm_head"
            key = f"{path}.base_layer.weight" if part.a is not None else f"{path}.weight"
            tensors[key] = part.weight.t() if turned else part.weight
        if part.tokens is not None and id(part.tokens) not in seen:
            seen.add(id(part.tokens))
            tensors[f"{path}.token_adapter.trainable_tokens_delta"] = part.tokens
    return {key: tensor.detach().float().cpu().contiguous().clone() for key, tensor in sorted(tensors.items())}
