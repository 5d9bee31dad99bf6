"""Attention and the cache by the native kernels (csrc/attention.cpp, csrc/rows.cpp)."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sized

import torch
from torch import Tensor

from quire.ops.cpu.library import ATTENTION, HEADS, KV, TYPES, call, live_numbers

Numbers = tuple[int, ...]


def write_kv(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor, scales: Tensor | None = None) -> None:
    k, v = _rows_of_heads(k), _rows_of_heads(v)
    slots = slots.contiguous()
    cache = KV.pack(*_cache(keys, values, scales))
    call("write_kv", cache, TYPES[k.dtype], len(k), _heads(k), _heads(v), slots.data_ptr())


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
    """q is turned in place, k on its way into the cache. For serving alone: nothing here has a gradient."""
    k, v = _rows_of_heads(k), _rows_of_heads(v)
    cos, sin, slots = cos.contiguous(), sin.contiguous(), slots.contiguous()
    assert q.stride(-1) == 1
    call(
        "rope_and_write",
        KV.pack(*_cache(keys, values, scales)),
        TYPES[q.dtype],
        len(q),
        q.shape[1],
        cos.shape[-1],
        _heads(q),
        _heads(k),
        _heads(v),
        cos.data_ptr(),
        sin.data_ptr(),
        slots.data_ptr(),
    )
    return q


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
    tables = block_tables.contiguous()
    return _attend(
        q,
        _cache(keys, values, scales),
        starts,
        lengths,
        (tables.data_ptr(), tables.shape[1], keys.shape[1]),
        (scale, softcap or 0.0, window or 0),
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
    k, v = _rows_of_heads(k), _rows_of_heads(v)
    return _attend(q, _rows(k, v), starts, _lengths(starts), (0, 0, 1), (scale, softcap or 0.0, window or 0))


def packed_attention_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: tuple[int, ...],
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, dy = (_rows_of_heads(x) for x in (q, k, v, dy))
    gradients = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    options = scale, softcap or 0.0, window or 0
    attention, _held = _call(q, 0, _rows(k, v), starts, _lengths(starts), (0, 0, 1), options)
    call("attend_backward", attention, _heads(dy), *(x.data_ptr() for x in gradients))
    return gradients


def _attend(q: Tensor, kv: Numbers, starts: Numbers, lengths: Numbers, tables: Numbers, options: tuple[float, ...]) -> Tensor:
    q = _rows_of_heads(q)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    attention, _held = _call(q, out.data_ptr(), kv, starts, lengths, tables, options)
    call("attend", attention)
    return out


def _call(
    q: Tensor, out: int, kv: Numbers, starts: Numbers, lengths: Numbers, tables: Numbers, options: tuple[float, ...]
) -> tuple[bytes, object]:
    """`quire_attention`, and what it points to and the caller holds."""
    assert len(q) == starts[-1]
    (borders, starts_at), (ends, lengths_at) = _numbers(starts), _numbers(lengths)
    assert len(borders) == len(ends) + 1
    token, head, _ = q.stride()
    place = q.data_ptr(), token, head, out
    heads = TYPES[q.dtype], q.shape[1]
    return ATTENTION.pack(*heads, *place, *kv, len(ends), starts_at, lengths_at, *tables, *options), (borders, ends)


def _rows(k: Tensor, v: Tensor) -> Numbers:
    """The fields of `quire_kv` for k, v [T, K, D]."""
    tokens, heads, size = k.shape
    places = k.data_ptr(), v.data_ptr()
    return TYPES[k.dtype], heads, size, tokens, *places, k.stride(0), k.stride(1), v.stride(0), v.stride(1), 0


def _cache(keys: Tensor, values: Tensor, scales: Tensor | None) -> Numbers:
    """The fields of `quire_kv` for keys, values [N, B, K, D]."""
    blocks, block, heads, size = keys.shape
    assert keys.is_contiguous()
    assert values.is_contiguous()
    token, scale = heads * size, 0
    if scales is not None:
        assert scales.is_contiguous()
        assert scales.dtype == torch.float32
        scale = scales.data_ptr()
    places = keys.data_ptr(), values.data_ptr()
    return TYPES[keys.dtype], heads, size, blocks * block, *places, token, size, token, size, scale


def _rows_of_heads(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads(x: Tensor) -> bytes:
    token, head, _ = x.stride()
    return HEADS.pack(x.data_ptr(), token, head)


def _numbers(values: Numbers) -> tuple[Sized, int]:
    """An array or what knows its length, and its address. Who uses the address keeps the first."""
    place = live_numbers(values)
    return _array(values) if place is None else (values, place)


# Every layer of a step gives the same tuples.
@functools.lru_cache(maxsize=64)
def _array(values: Numbers) -> tuple[ctypes.Array[ctypes.c_int64], int]:
    array = (ctypes.c_int64 * len(values))(*values)
    return array, ctypes.addressof(array)


@functools.lru_cache(maxsize=64)
def _lengths(starts: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(end - start for start, end in itertools.pairwise(starts))
