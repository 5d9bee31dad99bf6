"""Fresh adapters to train: PEFT's initialisation, from a seed and the module's name alone.

So a module starts the same whatever else the adapter has, and two runs with one seed start with the same bytes.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import torch
from torch import Tensor

from quire.errors import AdapterError
from quire.layers.embedding import Embedding
from quire.layers.norm import Norm
from quire.lora import experts
from quire.lora.base import dense_rows, pieces, sizes, written_name, written_names
from quire.lora.config import LoraConfig
from quire.lora.keys import share_tokens
from quire.lora.norms import weight_norms
from quire.lora.parts import Adapter, ModulePart
from quire.lora.targets import biased_modules, named_one_by_one, saved_modules, table_name, target_modules, tied, token_modules
from quire.models.decoder import CausalLM

STARTS = (True, False, "gaussian")


def new_adapter(model: CausalLM, config: LoraConfig, seed: int) -> Adapter:
    """A trainable adapter for `model`. Raises AdapterError for targets that are not there.

    Its configuration names the target modules one by one, as the folder will.
    """
    if config.init_lora_weights not in STARTS:
        raise AdapterError(
            f"init_lora_weights is {config.init_lora_weights!r}; a new adapter starts as true, false or gaussian.",
            parameter="init_lora_weights",
        )
    found = target_modules(config, model)
    turned = any(model.convert(f"{name}.weight", torch.empty(1, 2)).shape == (2, 1) for name in found)
    config = replace(config if config.target_parameters else named_one_by_one(config, model), fan_in_fan_out=turned)
    parts = {name: _part(model, config, name, seed) for name in found}
    _share_inputs(parts, config)
    for name in biased_modules(config, model, found):
        parts[name] = replace(parts.get(name, ModulePart()), bias=_copy(model.get_submodule(name).bias))
    for name in saved_modules(config, model):
        module = model.get_submodule(name)
        bias = None if isinstance(module, Embedding) else module.bias
        norm = isinstance(module, Norm)
        whole = _copy(module.weight if norm else torch.cat([rows for _, rows in pieces(model, module)]))
        parts[name] = ModulePart(
            weight=whole, bias=None if bias is None else _copy(bias), embedding=isinstance(module, Embedding)
        )
    tokens = token_modules(config, model)
    shared = model.config.tie_word_embeddings and len(tokens) == 2 and len(set(tokens.values())) == 1
    for name, ids in tokens.items():
        if shared and name == "lm_head":
            continue
        if name in parts and parts[name].weight is not None:
            message = f"{name} is in modules_to_save and in trainable_token_indices; give it to one of them."
            raise AdapterError(message, parameter="trainable_token_indices")
        part = parts.get(name, ModulePart(embedding=isinstance(model.get_submodule(name), Embedding)))
        rows = _copy(torch.cat([dense_rows(model.get_submodule(name), token, token + 1) for token in ids]))
        parts[name] = replace(part, tokens=rows, token_ids=ids)
    share_tokens(parts, tokens, model)
    if tied(config, model) and "lm_head" in parts and table_name(model) in parts:
        parts["lm_head"] = _tied_head(model, parts["lm_head"], parts[table_name(model)])
    if not parts:
        raise AdapterError("there is nothing to train: no target_modules, modules_to_save or trainable_token_indices.")
    return Adapter(config, dict(sorted(parts.items())), written_as=written_names(model, parts))


def _tied_head(model: CausalLM, head: ModulePart, table: ModulePart) -> ModulePart:
    """The head's part made of the table's tensors: the table's A is what the head's B is."""
    if table.weight is not None:
        return replace(head, weight=table.weight)
    if table.a is None:
        return head
    head = replace(head, a=table.b, b=table.a, scale=table.scale)
    if head.magnitude is None:
        return head
    return replace(head, magnitude=weight_norms(model, model.lm_head, head).requires_grad_())


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().float().clone().contiguous().requires_grad_()


def _part(model: CausalLM, config: LoraConfig, name: str, seed: int) -> ModulePart:
    module, path = model.get_submodule(name), experts.configured_path(written_name(model, name), config, model)
    inputs, outputs = sizes(model, module)
    embedding, rank, source = isinstance(module, Embedding), config.rank_of(path), generator(seed, name)
    if embedding and config.lora_bias:
        raise AdapterError(f"lora_bias is not defined for an embedding, and target_modules has {name}.", parameter="lora_bias")
    a, b = torch.zeros(rank, inputs), torch.zeros(rank, outputs)
    b_bias = torch.zeros(outputs) if config.lora_bias else None
    if embedding:
        b = torch.empty(outputs, rank).normal_(generator=source).t().contiguous()
        if config.init_lora_weights is False:
            a.normal_(generator=source)
    elif config.init_lora_weights == "gaussian":
        a.normal_(0.0, 1 / rank, generator=source)
    else:
        _uniform(a, inputs, source)
        if config.init_lora_weights is False:
            b = _uniform(torch.empty(outputs, rank), rank, source).t().contiguous()
            b_bias = None if b_bias is None else _uniform(b_bias, rank, source)
    part = ModulePart(a, b, config.scale_of(path), b_bias, embedding=embedding)
    if config.use_dora:
        part = replace(part, magnitude=weight_norms(model, module, part))
    return replace(part, **{field: tensor.requires_grad_() for field, tensor in part.tensors()})


def _uniform(tensor: Tensor, inputs: int, source: torch.Generator) -> Tensor:
    """As a linear layer of so many inputs starts."""
    bound = 1 / math.sqrt(inputs)
    return tensor.uniform_(-bound, bound, generator=source)


def _share_inputs(parts: dict[str, ModulePart], config: LoraConfig) -> None:
    """Where `target_parameters` names all experts' gate and up matrices, the two of an expert have one A."""
    for name in list(parts) if config.target_parameters else ():
        other = experts.sibling(name)
        if other != name and other in parts:
            parts[other] = replace(parts[other], a=parts[name].a)


def generator(seed: int, name: str) -> torch.Generator:
    """A source of numbers for one module."""
    digest = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
