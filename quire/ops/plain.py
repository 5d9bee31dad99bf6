"""torch's own kernels where they are faster than the reference: for training alone, chosen by `QUIRE_OPS=plain`.

A row's bits depend here on how many rows there are, so what was trained with it is served with other last bits; where
that matters (fine-tuning beside a server), the default is right.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional

from quire.ops.reference import (
    add,
    cross_entropy,
    draw,
    embedding,
    layer_norm,
    lora,
    lora_backward,
    lora_table,
    loras,
    masses,
    pack,
    packed_linear,
    packed_linears,
    packed_linears_backward,
    packed_rows,
    paged_attention,
    peaks,
    rope,
    rope_and_write,
    write_kv,
)
from quire.ops.reference import packed_attention as reference_packed_attention

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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return functional.rms_norm(x.float(), x.shape[-1:], weight.float() + offset, eps).to(x.dtype)


def activation(x: Tensor, kind: str) -> Tensor:
    wide = x.float()
    if kind == "silu":
        out = functional.silu(wide)
    elif kind == "relu":
        out = functional.relu(wide)
    else:
        out = functional.gelu(wide, approximate="tanh" if kind == "gelu_tanh" else "none")
    return out.to(x.dtype)


def gated_activation(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    return (activation(gate.float(), kind) * up.float()).to(gate.dtype)


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
    longest = max(end - start for start, end in itertools.pairwise(starts))
    if softcap is not None or (window is not None and window < longest):
        return reference_packed_attention(q, k, v, starts, scale=scale, window=window, softcap=softcap)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    parts = [
        functional.scaled_dot_product_attention(
            *(t[:, :, start:end] for t in (q, k, v)), is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        for start, end in itertools.pairwise(starts)
    ]
    return torch.cat(parts, dim=2)[0].transpose(0, 1)


packed_attention.differentiable = True
