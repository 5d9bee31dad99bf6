"""Fresh adapters to train: PEFT's initialisation, from a seed and the module's name alone.

So a module starts the same whatever else the adapter has, and two runs with one seed start with the same bytes.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from quire.layers.embedding import Embedding
from quire.lora.config import LoraConfig
from quire.lora.parts import Adapter, ModulePart
from quire.lora.targets import target_modules
from quire.models.decoder import CausalLM


def new_adapter(model: CausalLM, config: LoraConfig, seed: int) -> Adapter:
    """A trainable adapter for `model`. Raises AdapterError for targets that are not there."""
    parts = {name: _part(model, config, name, seed) for name in sorted(target_modules(config, model))}
    return Adapter(config, parts)


def _part(model: CausalLM, config: LoraConfig, name: str, seed: int) -> ModulePart:
    module = model.get_submodule(name)
    rank = config.rank_of(name)
    if isinstance(module, Embedding):
        a = torch.zeros(rank, model.config.vocab_size)
        b = _normal(rank, model.lm_head.inputs, 1.0, generator(seed, name)).t().contiguous()
        return ModulePart(a.requires_grad_(), b.requires_grad_(), config.scale_of(name))
    a, b = torch.empty(rank, module.inputs), torch.zeros(rank, module.outputs)
    source = generator(seed, name)
    if config.init_lora_weights == "gaussian":
        a = _normal(rank, module.inputs, 1 / rank, source)
    else:
        bound = 1 / math.sqrt(module.inputs)
        a.uniform_(-bound, bound, generator=source)
    return ModulePart(a.requires_grad_(), b.requires_grad_(), config.scale_of(name))


def generator(seed: int, name: str) -> torch.Generator:
    """A source of numbers for one module."""
    digest = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _normal(rows: int, columns: int, deviation: float, source: torch.Generator) -> Tensor:
    return torch.empty(rows, columns).normal_(0.0, deviation, generator=source)
