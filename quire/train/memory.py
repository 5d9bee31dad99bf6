"""How much memory a step keeps, and which layers compute their activations twice so that it finds room.

The formulas count the tensors that the backward passes of a layer read; they are upper bounds where native kernels keep
less. Knows shapes and the machine's free memory, no tensor. Letters: T tokens, E width, I MLP width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from quire.plan.hardware import probe

if TYPE_CHECKING:
    from quire.models.config import ModelConfig
    from quire.models.decoder import CausalLM

# Of what is free, the share that kept activations may take; the rest is for one layer's work and for others.
SHARE = 0.4
ITEMS = {"float32": 4, "bfloat16": 2, "float16": 2}


def activation_bytes(config: ModelConfig, item: int, rank: int) -> int:
    """What one layer keeps of one token: residual and norms, q, k, v, attention, gate, up and their product, and A's
    products in float32."""
    width, inner = config.hidden_size, config.intermediate_size * max(1, config.num_experts_per_token)
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    stored = 4 * width + 2 * heads + config.num_heads * config.head_dim + 4 * inner
    return stored * item + 7 * rank * 4


def recomputed_layers(model: CausalLM, runs: Iterable[Any], tokens: int) -> int:
    """How many layers, from the lowest trained one, compute their activations again in the backward pass of so many tokens."""
    runs = list(runs)
    count, wishes = model.config.num_layers, {run.config.gradient_checkpointing for run in runs}
    if wishes == {"on"}:
        return count
    if wishes == {"off"}:
        return 0
    item = next(model.parameters()).element_size()
    rank = max(run.flat.adapter.rank for run in runs)
    each = activation_bytes(model.config, item, rank) * tokens
    return max(0, count - int(SHARE * probe().memory_free) // max(1, each))
