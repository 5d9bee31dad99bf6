"""Operations that act on each row by itself: norms, rotation, activations, table look-up. All in float32, cast back at the end.

Why these formulas: torch's sigmoid, silu, gelu and pow treat the tail of a tensor with another routine than its body, so
an element's bits depend on where it lies. exp, tanh, erf, rsqrt and sums over the last dimension do not
(tests/ops/test_exactness.py holds both facts), so everything here is composed of those.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    return torch.nn.functional.embedding(ids, table)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    wide = x.float()
    scaled = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
    return (scaled * (weight.float() + offset)).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    scaled = centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)
    if weight is not None:
        scaled = scaled * weight.float()
    if bias is not None:
        scaled = scaled + bias.float()
    return scaled.to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*(part.to(x.dtype) for part in turned), rest], dim=-1)


def add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def activation(x: Tensor, kind: str) -> Tensor:
    wide = x.float()
    if kind == "silu":
        out = wide / (1 + torch.exp(-wide))
    elif kind == "gelu_tanh":
        out = 0.5 * wide * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide * wide * wide)))
    elif kind == "gelu":
        out = 0.5 * wide * (1 + torch.erf(wide * math.sqrt(0.5)))
    elif kind == "relu":
        out = wide.clamp_min(0)
    else:
        raise AssertionError(f"no activation {kind!r}")
    return out.to(x.dtype)


def gated_activation(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    return (activation(gate.float(), kind) * up.float()).to(gate.dtype)
