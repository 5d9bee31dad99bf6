"""Attention and the cache by the native kernels (csrc/attention.cpp, csrc/rows.cpp)."""

from __future__ import annotations

import ctypes
import functools
import itertools

import torch
from torch import Tensor

from quire.ops.cpu.library import TYPES, AttentionStruct, HeadsStruct, KvStruct, address, call


def write_kv(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor, scales: Tensor | None = None) -> None:
    k, v = _rows_of_heads(k), _rows_of_heads(v)
    slots = slots.contiguous()
    call("write_kv", _cache(keys, values, scales), TYPES[k.dtype], len(k), _heads(k), _heads(v), slots.data_ptr())


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
) -> None:
    """One call for `rope` of q and k and `write_kv`, with the same bits: q [T, H, D] is turned in place, k [T, K, D] on its way
    into the cache. k and v stay as they are. For serving alone: nothing here has a gradient."""
    k, v = _rows_of_heads(k), _rows_of_heads(v)
    cos, sin, slots = cos.contiguous(), sin.contiguous(), slots.contiguous()
    assert q.stride(-1) == 1
    call(
        "rope_and_write",
        _cache(keys, values, scales),
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
    rows = KvStruct(
        TYPES[k.dtype],
        k.shape[1],
        k.shape[2],
        len(k),
        k.data_ptr(),
        v.data_ptr(),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        None,
    )
    return _attend(q, rows, starts, _lengths(starts), (None, 0, 1), (scale, softcap or 0.0, window or 0))


def _attend(
    q: Tensor,
    kv: KvStruct,
    starts: tuple[int, ...],
    lengths: tuple[int, ...],
    tables: tuple[int | None, int, int],
    options: tuple[float, float, int],
) -> Tensor:
    q = _rows_of_heads(q)
    out = torch.empty(q.shape, dtype=q.dtype)
    numbers, ends = _numbers(starts), _numbers(lengths)
    call(
        "attend",
        AttentionStruct(
            TYPES[q.dtype],
            q.shape[1],
            _heads(q),
            out.data_ptr(),
            kv,
            len(lengths),
            ctypes.addressof(numbers),
            ctypes.addressof(ends),
            *tables,
            *options,
        ),
    )
    return out


def _cache(keys: Tensor, values: Tensor, scales: Tensor | None) -> KvStruct:
    """Of keys, values [N, B, K, D]."""
    blocks, block, heads, size = keys.shape
    assert keys.is_contiguous()
    assert values.is_contiguous()
    assert scales is None or (scales.is_contiguous() and scales.dtype == torch.float32)
    token = heads * size
    return KvStruct(
        TYPES[keys.dtype],
        heads,
        size,
        blocks * block,
        keys.data_ptr(),
        values.data_ptr(),
        token,
        size,
        token,
        size,
        address(scales),
    )


def _rows_of_heads(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads(x: Tensor) -> HeadsStruct:
    return HeadsStruct(x.data_ptr(), x.stride(0), x.stride(1))


# Every layer of a step gives the same tuples. The array is held by the caller while the call runs.
@functools.lru_cache(maxsize=64)
def _numbers(values: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


@functools.lru_cache(maxsize=64)
def _lengths(starts: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(end - start for start, end in itertools.pairwise(starts))
