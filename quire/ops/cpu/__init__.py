"""The operations by the native kernels of csrc/. What has no kernel yet is the reference's."""

from quire.ops.cpu.linear import linear, pack, packed_linear, packed_rows
from quire.ops.reference import (
    activation,
    embedding,
    gated_activation,
    layer_norm,
    packed_attention,
    paged_attention,
    rms_norm,
    rope,
    write_kv,
)

__all__ = [
    "activation",
    "embedding",
    "gated_activation",
    "layer_norm",
    "linear",
    "pack",
    "packed_attention",
    "packed_linear",
    "packed_rows",
    "paged_attention",
    "rms_norm",
    "rope",
    "write_kv",
]

PACKS_DENSE = True
