"""Gradients of the operations that are not plain torch: forward by the selected kernels, so that training computes the
same bits as serving; backward by whatever is fastest, since no promise rests on its order of summation."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quire.ops.weights import LoraTable


def _wanted(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def linear(forward: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _wanted(x, weight, bias):
        return _Linear.apply(forward, x, weight, bias)
    return forward(x, weight, bias)


def packed_attention(
    forward: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: tuple[int, ...],
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    if _wanted(q, k, v) and not getattr(forward, "differentiable", False):
        return _PackedAttention.apply(forward, q, k, v, starts, scale, window, softcap)
    return forward(q, k, v, starts, scale=scale, window=window, softcap=softcap)


def lora(forward: Callable[..., Tensor], x: Tensor, y: Tensor, slots: Tensor, table: LoraTable) -> Tensor:
    tensors = [tensor for weight in table.weights if weight is not None for tensor in (weight.a, weight.b)]
    if _wanted(x, y, *tensors):
        return _Lora.apply(forward, x, y, slots, table, *tensors)
    return forward(x, y, slots, table)


class _Linear(torch.autograd.Function):
    """y = x W^T + b; dx = dy W, dW = dy^T x, db = sum dy."""

    @staticmethod
    def forward(ctx: Any, forward: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            None,
            grad @ weight if need_x else None,
            grad.t() @ x if need_weight else None,
            grad.sum(0) if need_bias else None,
        )


class _Lora(torch.autograd.Function):
    """With u = x A^T and g = scale * dy: dB = u^T g, dA = (g B)^T x, dx = (g B) A, each over the rows of its slot."""

    @staticmethod
    def forward(
        ctx: Any, forward: Callable[..., Tensor], x: Tensor, y: Tensor, slots: Tensor, table: LoraTable, *tensors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, slots, *tensors)
        ctx.scales = {slot: weight.scale for slot, weight in enumerate(table.weights) if weight is not None}
        return forward(x, y.clone(), slots, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, slots, *tensors = ctx.saved_tensors
        dx = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        gradients: list[Tensor] = []
        for (slot, scale), a, b in zip(ctx.scales.items(), tensors[::2], tensors[1::2], strict=True):
            rows = (slots == slot).nonzero()[:, 0]
            inputs, g = x[rows].float(), grad[rows].float() * scale
            inner = g @ b.t()
            gradients += [inner.t() @ inputs, (inputs @ a.t()).t() @ g]
            if dx is not None:
                dx[rows] = (inner @ a).to(x.dtype)
        return None, dx, grad if ctx.needs_input_grad[2] else None, None, None, *gradients


class _PackedAttention(torch.autograd.Function):
    """Saves q, k, v only; backward recomputes each sequence's scores (as FlashAttention does)."""

    @staticmethod
    def forward(
        ctx: Any,
        forward: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        starts: tuple[int, ...],
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.options = starts, scale, window, softcap
        return forward(q, k, v, starts, scale=scale, window=window, softcap=softcap)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        starts, scale, window, softcap = ctx.options
        tensors = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            out = torch.cat(
                [
                    _sequence_attention(*(t[start:end] for t in tensors), scale, window, softcap)
                    for start, end in itertools.pairwise(starts)
                ]
            )
        return (None, *torch.autograd.grad(out, tensors, grad), None, None, None, None)


def _sequence_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """One sequence, q [T, H, D], k, v [T, K, D], by torch's own attention where it can."""
    count = len(q)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    if softcap is None and (window is None or window >= count):
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out[0].transpose(0, 1)
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1).float() for t in (k, v))
    scores = q.float() @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    rows = torch.arange(count, device=q.device)
    distance = rows[:, None] - rows
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ v)[0].transpose(0, 1).to(q.dtype)
