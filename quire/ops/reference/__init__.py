"""The operations in plain torch: what each one means. Every other implementation is compared with this one."""

from quire.ops.reference.attention import packed_attention, paged_attention, rope_and_write, write_kv
from quire.ops.reference.draw import draw
from quire.ops.reference.linear import linear
from quire.ops.reference.lora import lora, lora_backward, lora_table, loras
from quire.ops.reference.masses import cross_entropy, masses, peaks
from quire.ops.reference.packed import pack, packed_linear, packed_linears, packed_linears_backward, packed_rows
from quire.ops.reference.rows import activation, add, embedding, gated_activation, layer_norm, rms_norm, rope

__all__ = [
    "activation",
    "add",
    "cross_entropy",
    "draw",
    "embedding",
    "gated_activation",
    "layer_norm",
    "linear",
    "lora",
    "lora_backward",
    "lora_table",
    "loras",
    "masses",
    "pack",
    "packed_attention",
    "packed_linear",
    "packed_linears",
    "packed_linears_backward",
    "packed_rows",
    "paged_attention",
    "peaks",
    "rms_norm",
    "rope",
    "rope_and_write",
    "write_kv",
]
