"""Gradients of the operations that are not plain torch: forward by the selected kernels, so that training computes the
same bits as serving; backward by whatever is fastest, since no promise rests on its order of summation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
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


def packed_linear(
    forward: Callable[..., Tensor], backward: Callable[..., Tensor], x: Tensor, packed: Any, bias: Tensor | None
) -> Tensor:
    if _wanted(x, bias):

        def compute(x: Tensor, weights: Sequence[Any], biases: Sequence[Tensor | None]) -> list[Tensor]:
            return [forward(x, weights[0], biases[0])]

        return _PackedLinears.apply(compute, backward, x, (packed,), bias)[0]
    return forward(x, packed, bias)


def packed_linears(
    forward: Callable[..., list[Tensor]],
    backward: Callable[..., Tensor],
    x: Tensor,
    weights: Sequence[Any],
    biases: Sequence[Tensor | None],
) -> list[Tensor]:
    if _wanted(x, *biases):
        return list(_PackedLinears.apply(forward, backward, x, weights, *biases))
    return forward(x, weights, biases)


def packed_attention(
    forward: Callable[..., Tensor],
    backward: Callable[..., tuple[Tensor, ...]] | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: tuple[int, ...],
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    if _wanted(q, k, v) and not getattr(forward, "differentiable", False):
        return _PackedAttention.apply(forward, backward or _recomputed, q, k, v, starts, scale, window, softcap)
    return forward(q, k, v, starts, scale=scale, window=window, softcap=softcap)


def lora(
    forward: Callable[..., Tensor], backward: Callable[..., Any], x: Tensor, y: Tensor, slots: Tensor, table: LoraTable
) -> Tensor:
    if torch.is_grad_enabled() and _wanted(x, y, *table.tensors):
        y = y.clone() if y.requires_grad and y.is_leaf else y  # a leaf may not be overwritten
        return _Lora.apply(forward, backward, x, y, slots, table, *table.tensors)
    return forward(x, y, slots, table)


def loras(
    together: Callable[..., list[Tensor]],
    forward: Callable[..., Tensor],
    backward: Callable[..., Any],
    x: Tensor,
    ys: Sequence[Tensor],
    slots: Tensor,
    tables: Sequence[LoraTable],
) -> list[Tensor]:
    if torch.is_grad_enabled() and _wanted(x, *ys, *(tensor for table in tables for tensor in table.tensors)):
        return [lora(forward, backward, x, y, slots, table) for y, table in zip(ys, tables, strict=True)]
    return together(x, ys, slots, tables)


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


class _PackedLinears(torch.autograd.Function):
    """The weights stay as they are; `backward` gives the sum of their dy W."""

    @staticmethod
    def forward(
        ctx: Any,
        forward: Callable[..., list[Tensor]],
        backward: Callable[..., Tensor],
        x: Tensor,
        weights: Sequence[Any],
        *biases: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.compute, ctx.weights, ctx.dtype = backward, weights, x.dtype
        return tuple(forward(x, weights, biases))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _, _, need_x, _, *need_biases = ctx.needs_input_grad
        pairs = zip(grads, need_biases, strict=True)
        biases = [grad.sum(0) if need and grad is not None else None for grad, need in pairs]
        dx = ctx.compute(grads, ctx.weights, ctx.dtype) if need_x else None
        return None, None, dx, None, *biases


class _Lora(torch.autograd.Function):
    """`backward` gives the gradients of x and of the table's tensors; y's is dy itself."""

    @staticmethod
    def forward(
        ctx: Any,
        forward: Callable[..., Tensor],
        backward: Callable[..., Any],
        x: Tensor,
        y: Tensor,
        slots: Tensor,
        table: LoraTable,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, slots, *tensors)  # the tensors: so that a change before `backward` is noticed
        ctx.table, ctx.compute = table, backward
        out = forward(x, y, slots, table)
        if out is y:
            ctx.mark_dirty(y)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, slots, *_ = ctx.saved_tensors
        _, _, need_x, need_y, _, _, *need_weights = ctx.needs_input_grad
        dx, gradients = ctx.compute(grad, x, slots, ctx.table, need_x, need_weights)
        return None, None, dx, grad if need_y else None, None, None, *gradients


class _PackedAttention(torch.autograd.Function):
    """Saves q, k, v only: backward computes the scores again (as FlashAttention does)."""

    @staticmethod
    def forward(
        ctx: Any,
        forward: Callable[..., Tensor],
        backward: Callable[..., tuple[Tensor, ...]],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        starts: tuple[int, ...],
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.compute, ctx.options = backward, (starts, scale, window, softcap)
        return forward(q, k, v, starts, scale=scale, window=window, softcap=softcap)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.compute(grad, *ctx.saved_tensors, *ctx.options)
        return (None, None, *gradients, None, None, None, None)


def _recomputed(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: tuple[int, ...],
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, ...]:
    """For implementations without gradients of their own: those of torch's attention, sequence by sequence."""
    tensors = [t.detach().requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        parts = [
            _sequence_attention(*(t[start:end] for t in tensors), scale, window, softcap)
            for start, end in itertools.pairwise(starts)
        ]
        out = torch.cat(parts)
    return torch.autograd.grad(out, tensors, grad)


def _sequence_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
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
