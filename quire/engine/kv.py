"""The KV cache's memory: allocation from the plan, and the copies that sharing needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quire.batch import KVCache
from quire.models.config import ModelConfig
from quire.ops.room import uninitialized

# By the plan's names. The last three take one byte per number and have scales.
KV_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
}


def allocate(
    config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, scales: list[Tensor] | None = None
) -> KVCache:
    """Keys and values of all layers for `num_blocks` blocks and the null block.

    Memory is taken when it is first written, in huge pages where a layer has some. What it holds before is never let into a
    product (ops/reference/attention).
    """
    shape = (num_blocks + 1, block_size, config.num_kv_heads, config.head_dim)
    layers = range(config.num_layers)
    keys, values = ([uninitialized(shape, dtype) for _ in layers] for _ in range(2))
    return KVCache(keys, values, scales)


def copy_blocks(kv: KVCache, copies: Sequence[tuple[int, int]]) -> None:
    """Copy whole blocks, in order, in every layer."""
    for source, target in copies:
        for layer in (*kv.keys, *kv.values):
            layer[target].copy_(layer[source])
