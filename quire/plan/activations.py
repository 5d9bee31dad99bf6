"""How much memory one step needs besides weights and KV cache: the live buffers of our own forward pass at its widest.

The formulas follow the reference operations (quire/ops/reference) and the sampler buffer by buffer; a native kernel needs
less, so the number is an upper bound there. This room knows shapes only.

Letters: T tokens in the step, S sequences, E width, H heads, K kv heads, D head size, I MLP width, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.models.config import ModelConfig

# As in quire/ops/reference/attention.py and quire/sampling/sampler.py, which this torch-free room cannot import; a test
# compares them.
SPAN = 128
TILE = 8
MOST_GATHERED = 1 << 23
PIECE = 1 << 22
FLOAT = 4
# glibc keeps freed pieces below its threshold of 32 MiB. With this one fifth added, the number was 1.01 to 1.51 times the
# resident peak over eight shapes; without it, 0.84 times in the worst.
KEPT_BY_ALLOCATOR = 5
# Buffers that live together while a piece of logits is sampled: logits, masked copy, padded copy, weights, scratch
# (float32) and an order (int64).
SAMPLER_BYTES_PER_LOGIT = 5 * FLOAT + 8


def activation_bytes(model: ModelConfig, item: int, tokens: int, sequences: int) -> int:
    """Peak bytes of a step of `tokens` tokens of `sequences` sequences, in a type of `item` bytes."""
    stream = 3 * tokens * model.hidden_size * item  # residual, the sublayer's input and its output
    layer = max(_norm(model, item, tokens), _attention(model, item, tokens, sequences), _mlp(model, item, tokens))
    live = stream + max(layer, _logits(model, item, sequences))
    return live + live // KEPT_BY_ALLOCATOR


def _norm(model: ModelConfig, item: int, tokens: int) -> int:
    """Three float32 copies on the way from x to its norm."""
    return tokens * model.hidden_size * 3 * FLOAT


def _attention(model: ModelConfig, item: int, tokens: int, sequences: int) -> int:
    """q, k, v before and after rotation, the output, and the tiles in float32 with the keys gathered for one span."""
    heads, kv_heads, size = model.num_heads, model.num_kv_heads, model.head_dim
    projected = tokens * (2 * heads + 3 * kv_heads) * size * item + tokens * heads * size * item
    # A sequence of one row still takes a tile.
    rows = tokens + (TILE - 1) * min(sequences, tokens)
    tiles = rows // TILE + 1
    per_product = min(tiles, max(1, MOST_GATHERED // (SPAN * kv_heads * size)))
    gathered = per_product * SPAN * kv_heads * size * 2 * (item + 2 * FLOAT)
    rows = min(rows, per_product * 64)
    folded = rows * heads * (6 * size + 4 * SPAN) * FLOAT
    return projected + gathered + folded


def _mlp(model: ModelConfig, item: int, tokens: int) -> int:
    """Gate and up as stored; gate, its activation, up and their product in float32. Experts run one after the other."""
    gathered = tokens * model.hidden_size * (item + 3 * FLOAT) if model.num_experts else 0
    floats = 4 if item < FLOAT else 3  # float32 needs no copy of the gate
    return tokens * model.intermediate_size * (2 * item + floats * FLOAT) + gathered


def _logits(model: ModelConfig, item: int, sequences: int) -> int:
    """One row of logits per sequence, as computed and in float32, and the workspace of one piece of the sampler."""
    logits = sequences * model.vocab_size
    return logits * (item + FLOAT) + min(logits, max(PIECE, model.vocab_size)) * SAMPLER_BYTES_PER_LOGIT
