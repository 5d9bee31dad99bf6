"""Row operations by the native kernels (csrc/rows.cpp).

Where a gradient is wanted the forward pass is the same kernel. Backward, rows have kernels of their own (gradients.py); for the
rest the reference's formula is derived: its order of summation carries no promise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quire.ops.cpu import gradients
from quire.ops.cpu.gradients import KINDS, as_rows
from quire.ops.cpu.library import TYPES, address, call
from quire.ops.reference import rows as reference


class _Derived(torch.autograd.Function):
    """compute(*arguments), with the gradients of meaning(*arguments)."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Tensor], meaning: Callable[..., Tensor], *arguments: Any) -> Tensor:
        ctx.meaning = meaning
        ctx.others = [None if isinstance(argument, Tensor) else argument for argument in arguments]
        ctx.places = [n for n, argument in enumerate(arguments) if isinstance(argument, Tensor)]
        ctx.save_for_backward(*(arguments[n] for n in ctx.places))
        return compute(*arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        arguments = list(ctx.others)
        wanted = [n for n in ctx.places if ctx.needs_input_grad[n + 2]]
        for n, saved in zip(ctx.places, ctx.saved_tensors, strict=True):
            arguments[n] = saved.detach().requires_grad_(n in wanted)
        with torch.enable_grad():
            out = ctx.meaning(*arguments)
        found = dict(zip(wanted, torch.autograd.grad(out, [arguments[n] for n in wanted], grad), strict=True))
        return None, None, *(found.get(n) for n in range(len(arguments)))


class _Rows(torch.autograd.Function):
    """compute(*arguments), with the gradients of its first tensors by gradient(dy, *arguments)."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Tensor], gradient: Callable[..., Any], *arguments: Any) -> Tensor:
        ctx.gradient = gradient
        ctx.others = [None if isinstance(argument, Tensor) else argument for argument in arguments]
        ctx.places = [n for n, argument in enumerate(arguments) if isinstance(argument, Tensor)]
        ctx.save_for_backward(*(arguments[n] for n in ctx.places))
        return compute(*arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        arguments = list(ctx.others)
        for n, saved in zip(ctx.places, ctx.saved_tensors, strict=True):
            arguments[n] = saved
        found = ctx.gradient(grad, *arguments)
        return None, None, *found, *[None] * (len(arguments) - len(found))


def _wanted(arguments: tuple[Any, ...]) -> bool:
    return any(isinstance(a, Tensor) and a.requires_grad for a in arguments)


def _run(compute: Callable[..., Tensor], meaning: Callable[..., Tensor], *arguments: Any) -> Tensor:
    if torch.is_grad_enabled() and _wanted(arguments):
        rows, gradient = GRADIENTS.get(meaning, (0, None))
        if gradient is not None and not _wanted(arguments[rows:]):
            return _Rows.apply(compute, gradient, *arguments)
        return _Derived.apply(compute, meaning, *arguments)
    return compute(*arguments)


def _rope_gradient(dy: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor]:
    """Turned back."""
    del x
    return (_rope(dy, cos, -sin),)


# By the reference: how many of the first arguments are rows, and the kernel of their gradients.
GRADIENTS: dict[Callable[..., Tensor], tuple[int, Callable[..., tuple[Tensor, ...]]]] = {
    reference.rms_norm: (1, gradients.rms_norm),
    reference.layer_norm: (1, gradients.layer_norm),
    reference.rope: (1, _rope_gradient),
    reference.activation: (1, gradients.activation),
    reference.gated_activation: (2, gradients.gated_activation),
}


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    return _run(_embedding, reference.embedding, ids, table)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    return _run(_rms_norm, reference.rms_norm, x, weight, eps, offset)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return _run(_layer_norm, reference.layer_norm, x, weight, bias, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _run(_rope, reference.rope, x, cos, sin)


def activation(x: Tensor, kind: str) -> Tensor:
    return _run(_activation, reference.activation, x, kind)


def gated_activation(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    return _run(_gated_activation, reference.gated_activation, gate, up, kind)


def add(x: Tensor, y: Tensor) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        return x + y
    if x.dtype != y.dtype or x.shape != y.shape or not (x.is_contiguous() and y.is_contiguous()):
        return x + y
    out = torch.empty_like(x)
    call("add", TYPES[x.dtype], x.numel(), x.data_ptr(), y.data_ptr(), out.data_ptr())
    return out


def _embedding(ids: Tensor, table: Tensor) -> Tensor:
    if table.stride(-1) != 1:
        table = table.contiguous()
    ids = ids.contiguous()
    out = torch.empty(*ids.shape, table.shape[1], dtype=table.dtype)
    each = table.element_size()
    call(
        "gather_rows",
        ids.numel(),
        ids.data_ptr(),
        table.data_ptr(),
        len(table),
        table.shape[1] * each,
        table.stride(0) * each,
        out.data_ptr(),
    )
    return out


def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    x, rows, stride = as_rows(x)
    weight = weight.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    call(
        "rms_norm",
        TYPES[x.dtype],
        TYPES[weight.dtype],
        rows,
        x.shape[-1],
        x.data_ptr(),
        stride,
        weight.data_ptr(),
        eps,
        offset,
        out.data_ptr(),
    )
    return out


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    x, rows, stride = as_rows(x)
    given = [t.contiguous() for t in (weight, bias) if t is not None]
    if len({t.dtype for t in given}) > 1:
        weight, bias = (t.float() for t in given)
        given = [weight, bias]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    call(
        "layer_norm",
        TYPES[x.dtype],
        TYPES[given[0].dtype] if given else 0,
        rows,
        x.shape[-1],
        x.data_ptr(),
        stride,
        address(weight),
        address(bias),
        eps,
        out.data_ptr(),
    )
    return out


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    tokens, heads, size = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    call(
        "rope",
        TYPES[x.dtype],
        tokens,
        heads,
        size,
        cos.shape[-1],
        x.data_ptr(),
        x.stride(0),
        x.stride(1),
        cos.data_ptr(),
        sin.data_ptr(),
        out.data_ptr(),
    )
    return out


def _activation(x: Tensor, kind: str) -> Tensor:
    return _activate(x, None, kind)


def _gated_activation(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    return _activate(gate, up if up.dtype == gate.dtype else up.to(gate.dtype), kind)


def _activate(x: Tensor, up: Tensor | None, kind: str) -> Tensor:
    x, rows, stride = as_rows(x)
    other = (None, 0)
    if up is not None:
        up, _, up_stride = as_rows(up)
        other = up.data_ptr(), up_stride
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    call("activation", TYPES[x.dtype], KINDS[kind], rows, x.shape[-1], x.data_ptr(), stride, *other, out.data_ptr())
    return out
