"""The operations by the native kernels of csrc/."""

from quire.ops.cpu.attention import packed_attention, packed_attention_backward, paged_attention, rope_and_write, write_kv
from quire.ops.cpu.linear import linear, pack, packed_linear, packed_linears, packed_linears_backward, packed_rows
from quire.ops.cpu.lora import lora, lora_backward, lora_table, loras
from quire.ops.cpu.parts import packed_from_parts, packed_parts
from quire.ops.cpu.rows import activation, add, embedding, gated_activation, layer_norm, rms_norm, rope
from quire.ops.cpu.tape import Tape
from quire.ops.cpu.vocabulary import cross_entropy, draw, masses, peaks

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
    "packed_attention_backward",
    "packed_from_parts",
    "packed_linear",
    "packed_linears",
    "packed_linears_backward",
    "packed_parts",
    "packed_rows",
    "paged_attention",
    "peaks",
    "rms_norm",
    "rope",
    "rope_and_write",
    "write_kv",
]

PACKS_DENSE = True
record = Tape
