"""How much memory a LoRA adapter takes: A and B of every linear layer at the largest rank, in float32. Knows shapes only.

Letters: E width, H heads, K kv heads, D head size, I MLP width, R rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.models.config import ModelConfig

FLOAT = 4


def adapter_bytes(model: ModelConfig, rank: int) -> int:
    """Bytes of one adapter of rank R on every linear layer but the head and a router: R x (inputs + outputs) for each.

    A slot has no copy of its own. What an adapter may have beside A and B (full copies of modules, most of all) is not in it.
    """
    width, query, shared = model.hidden_size, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    attention = (width + query) + 2 * (width + shared) + (query + width)
    inner = int(model.raw.get("moe_intermediate_size") or model.intermediate_size)
    feed_forward = 3 * (width + inner) * max(1, model.num_experts)
    return model.num_layers * (attention + feed_forward) * rank * FLOAT
