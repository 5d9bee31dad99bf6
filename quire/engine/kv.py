"""The KV cache's memory: allocation from the plan, and the copies that sharing needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quire.batch import KVCache
from quire.models.config import ModelConfig


def allocate(config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype) -> KVCache:
    """Keys and values of all layers for `num_blocks` blocks and the null block.

    The memory is taken when it is first written; what it holds before is never let into a product (ops/reference/attention).
    """
    shape = (num_blocks + 1, block_size, config.num_kv_heads, config.head_dim)
    layers = range(config.num_layers)
    return KVCache([torch.empty(shape, dtype=dtype) for _ in layers], [torch.empty(shape, dtype=dtype) for _ in layers])


def copy_blocks(kv: KVCache, copies: Sequence[tuple[int, int]]) -> None:
    """Copy whole blocks, in order, in every layer."""
    for source, target in copies:
        for layer in (*kv.keys, *kv.values):
            layer[target].copy_(layer[source])
