"""The list of operations: everything a model computes that is worth a kernel.

Each name below exists under the same name and signature in every implementation (`reference` states the meaning; native
and GPU kernels come beside it). All are pure functions of tensors: they know no model, no request and no scheduler.

The contract that carries "same request, same bits": **row r of a result depends on row r of the input (and, for attention,
on that row's own sequence) only** - never on the number of rows, on chunk borders or on the number of threads.

Letters: T tokens, S sequences, H heads, K kv heads, D head size, N blocks, B block size, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quire.ops import autograd, loss
from quire.ops.select import selected
from quire.ops.weights import LoraTable, LoraWeight, Weight

OPERATIONS = (
    "linear",
    "pack",
    "packed_linear",
    "packed_linears",
    "packed_rows",
    "lora_table",
    "lora",
    "loras",
    "embedding",
    "rms_norm",
    "layer_norm",
    "rope",
    "add",
    "activation",
    "gated_activation",
    "write_kv",
    "rope_and_write",
    "paged_attention",
    "packed_attention",
    "peaks",
    "masses",
    "cross_entropy",
    "draw",
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, I] times weight [O, I] transposed, plus bias [O]: [T, O] in x's dtype. Differentiable."""
    return autograd.linear(selected().linear, x, weight, bias)


def packs_dense() -> bool:
    """Whether this implementation wants dense weights packed too; else a layer keeps its tensor as it is."""
    return getattr(selected(), "PACKS_DENSE", False)


def record(compute: Callable[[], Tensor], live: Sequence[tuple[int, ...]] = ()) -> Any:
    """`compute()`, written down to be made again: `.result` and, unless `.refused` says why not, `.replay(*live)`, the same
    tensor computed from what its inputs' memory holds by then. live: tuples among its inputs that will differ. None where
    this implementation cannot."""
    recorder = getattr(selected(), "record", None)
    return None if recorder is None else recorder(compute, live)


def pack(weight: Weight) -> Any:
    """`weight` in the layout that this implementation's kernels read; what it was made of may be freed afterwards."""
    return selected().pack(weight)


def stores_packed() -> bool:
    """Whether this implementation's packed weights have parts of their own that can be kept in a file."""
    return hasattr(selected(), "packed_parts")


def packed_parts(packed: Any) -> tuple[Mapping[str, int], dict[str, Tensor]]:
    """(plain numbers, tensors) that a packed weight consists of; only where `stores_packed`."""
    return selected().packed_parts(packed)


def packed_from_parts(facts: Mapping[str, int], parts: Mapping[str, Tensor]) -> Any:
    """The packed weight of `packed_parts`, using the tensors' memory. Raises ValueError for what does not fit together."""
    return selected().packed_from_parts(facts, parts)


def packed_linear(x: Tensor, packed: Any, bias: Tensor | None = None) -> Tensor:
    """x [T, I] times a packed weight [O, I] transposed, plus bias [O]: [T, O] in x's dtype. Differentiable in x and bias."""
    kernels = selected()
    return autograd.packed_linear(kernels.packed_linear, kernels.packed_linears_backward, x, packed, bias)


def packed_linears(x: Tensor, weights: Sequence[Any], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """`packed_linear` of the same x with several weights: bit for bit the same, and x is prepared once."""
    kernels = selected()
    return autograd.packed_linears(kernels.packed_linears, kernels.packed_linears_backward, x, weights, biases)


def packed_rows(ids: Tensor, packed: Any, dtype: torch.dtype) -> Tensor:
    """Rows `ids` [T] of a packed weight [V, E], as `dtype`: [T, E] (an embedding that shares the head's weight)."""
    return selected().packed_rows(ids, packed, dtype)


def lora_table(weights: Sequence[LoraWeight | None]) -> LoraTable:
    """The adapters of one linear layer by slot, as this implementation's kernels want them. Their tensors are not copied:
    what is written into them later is what `lora` reads."""
    return selected().lora_table(weights)


def lora(x: Tensor, y: Tensor, slots: Tensor, table: LoraTable) -> Tensor:
    """y [T, O] plus, for each row whose slot has a weight, scale * (x A^T) B^T: float32 inside, y's dtype outside.

    x [T, I], slots [T] int32: -1 for rows that stay as they are. y may be overwritten. Differentiable in x, y and the
    tensors of the table.
    """
    kernels = selected()
    return autograd.lora(kernels.lora, kernels.lora_backward, x, y, slots, table)


def loras(x: Tensor, ys: Sequence[Tensor], slots: Tensor, tables: Sequence[LoraTable]) -> list[Tensor]:
    """`lora` of several linears that were given the same x: bit for bit the same, in one call."""
    kernels = selected()
    return autograd.loras(kernels.loras, kernels.lora, kernels.lora_backward, x, ys, slots, tables)


def peaks(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit [R], float32, and its lowest token id [R] of each row [R, V]. NaN counts as largest (with any id)."""
    return selected().peaks(logits)


def draw(logits: Tensor, temperatures: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor, uniforms: Tensor) -> Tensor:
    """One token [R] for each row of float32 logits [R, V]; -1 where the largest logit is NaN or infinite.

    temperatures, min_p, top_p, uniforms [R] float64, top_k [R] int64. Temperature 0: the largest logit, lowest id among equals.
    Else a token weighs exp((logit - largest logit) / temperature), and these follow each other:
    min_p: a token stays if its weight is at least min_p, that is its probability min_p times that of the most likely token.
    top_k (0 is off): exactly k tokens stay; of equal logits the lowest token ids (vLLM keeps all that tie with the k-th).
    top_p (1 is off): the smallest set of most likely tokens whose mass reaches top_p of what min_p and top_k have left, at
    least one token.
    Of what is left, uniform in [0, 1) takes the token at that share of the mass: in order of likelihood under top_k or top_p,
    else in order of token ids.

    Masses are integers in units of 2^-40 (csrc/masses.h), so no bit depends on an order of summation, and every
    implementation draws the same token.
    """
    return selected().draw(logits, temperatures, min_p, top_k, top_p, uniforms)


def log_softmax_at(logits: Tensor, ids: Tensor) -> Tensor:
    """float32 log-probabilities [R, K] of tokens ids [R, K] under logits [R, V]; NaN where a row's largest is not finite."""
    return loss.log_softmax_at(selected(), logits, ids)


def cross_entropy(logits: Tensor, targets: Tensor, slope: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(log-probabilities [R] of targets [R], bit for bit those of `log_softmax_at`; whether each was the likeliest [R]).

    slope [R, V], of the logits' type, receives the gradient of minus the log-probabilities with respect to the logits:
    softmax, less one at the target. It may be the logits' own memory.
    """
    return loss.cross_entropy(selected(), logits, targets, slope)


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """Rows `ids` [T] of table [V, E]: [T, E]."""
    return selected().embedding(ids, table)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dimension, in float32 (Zhang & Sennrich 2019)."""
    return selected().rms_norm(x, weight, eps, offset)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension, in float32."""
    return selected().layer_norm(x, weight, bias, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, H, D] by angles cos, sin [T, R/2] in the half-split layout; dimensions past R <= D pass through."""
    return selected().rope(x, cos, sin)


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y."""
    return selected().add(x, y)


def activation(x: Tensor, kind: str) -> Tensor:
    """silu | gelu | gelu_tanh | relu, elementwise, in float32."""
    return selected().activation(x, kind)


def gated_activation(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """activation(gate) * up."""
    return selected().gated_activation(gate, up, kind)


def write_kv(
    keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor, scales: Tensor | None = None
) -> None:
    """Store k, v [T, K, D] at `slots` [T] (block * B + offset) of keys, values [N, B, K, D], in place.

    A cache of one byte per number (int8, float8_e4m3fn, float8_e5m2) holds k / scale, with scales [2, K] float32 (0: keys,
    1: values; None: 1): the nearest number of its type, ties to the even one, what is out of range (+-127, +-448, +-57344)
    the largest; a NaN is NaN, but 0 in int8, which has none. `paged_attention` reads stored * scale, in float32.
    """
    selected().write_kv(keys, values, k, v, slots, scales)


def rope_and_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    scales: Tensor | None = None,
) -> Tensor:
    """`write_kv` of the rotated k, and the rotated q, with the bits of `rope` and `write_kv`. q may be overwritten."""
    return selected().rope_and_write(q, k, v, cos, sin, keys, values, slots, scales)


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    starts: tuple[int, ...],
    lengths: tuple[int, ...],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """Causal attention of q [T, H, D] over the cache: [T, H, D].

    Rows starts[s]:starts[s+1] are the last ones of a sequence of lengths[s] tokens, whose keys lie in the blocks
    block_tables[s] of keys, values [N, B, K, D]. window: each row sees itself and the window - 1 tokens before it.
    softcap: scores become softcap * tanh(scores / softcap). scales: as they were given to `write_kv`.
    """
    return selected().paged_attention(
        q, keys, values, block_tables, starts, lengths, scale=scale, window=window, softcap=softcap, scales=scales
    )


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: tuple[int, ...],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention within each of the sequences laid end to end: q [T, H, D], k, v [T, K, D]. Differentiable.

    Gives the same bits as `paged_attention` over the same tokens.
    """
    kernels = selected()
    backward = getattr(kernels, "packed_attention_backward", None)
    return autograd.packed_attention(kernels.packed_attention, backward, q, k, v, starts, scale, window, softcap)
