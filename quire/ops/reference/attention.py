"""Causal attention over paged or packed keys with a fixed order of summation.

Keys are read in spans of 128 positions counted from the start of the sequence; each query row folds the spans one by one
into a running maximum, sum and output (Milakov & Gimelshein 2018; Dao 2022). A span that a row may not see changes
nothing, to the bit: its weights are exactly 0 and its rescaling exactly 1. So a row's result depends on its position and
its sequence only, wherever chunks begin or end.

Query rows of one sequence are computed in tiles of fixed sizes (see `linear.py` for why, and for the trial).

A cache of one byte per number is read back to float32 before anything is computed with it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.ops.reference.rows import rope
from quire.ops.reference.trial import cancelling

SPAN = 128
TILE = 8
OTHER_TILES = (64, 1)
# Bounds the scratch memory: keys gathered for one product, in elements.
MOST_GATHERED = 1 << 23
LARGEST_INT8 = 127

Gather = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def write_kv(
    keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor, scales: Tensor | None = None
) -> None:
    for kind, (cache, rows) in enumerate(((keys, k), (values, v))):
        rows = _stored(rows, cache.dtype, None if scales is None else scales[kind])
        if cache.element_size() == 1:
            cache, rows = cache.view(torch.uint8), rows.view(torch.uint8)  # torch copies no float8 by index
        cache.view(-1, *cache.shape[2:]).index_copy_(0, slots, rows)


def _stored(rows: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """rows [T, K, D] as the cache's type holds them; scale: [K]."""
    if dtype.itemsize > 1:
        return rows.to(dtype)
    rows = rows.float()
    if scale is not None:
        rows = rows / scale[:, None]
    if dtype == torch.int8:
        return rows.round().nan_to_num(0.0, LARGEST_INT8, -LARGEST_INT8).clamp(-LARGEST_INT8, LARGEST_INT8).to(dtype)
    largest = torch.finfo(dtype).max
    return rows.clamp(-largest, largest).to(dtype)


def _read(rows: Tensor, scale: Tensor | None) -> Tensor:
    """What `_stored` rows [..., K, D] stand for."""
    return rows if scale is None else rows.float() * scale[:, None]


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
    write_kv(keys, values, rope(k, cos, sin), v, slots, scales)
    return rope(q, cos, sin)


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
    key_scale, value_scale = (None, None) if scales is None else scales
    blocks_per_span = SPAN // keys.shape[1]
    short = -block_tables.shape[1] % blocks_per_span
    tables = torch.nn.functional.pad(block_tables, (0, short)) if short else block_tables

    def gather(sequence: Tensor, _first: Tensor, span: int) -> tuple[Tensor, Tensor]:
        blocks = tables[sequence, span * blocks_per_span : (span + 1) * blocks_per_span]
        return _read(keys[blocks].flatten(1, 2), key_scale), _read(values[blocks].flatten(1, 2), value_scale)

    return _attend(q, keys.shape[2], starts, lengths, gather, scale, window, softcap)


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
    offsets = torch.arange(SPAN, device=q.device)

    def gather(_sequence: Tensor, first: Tensor, span: int) -> tuple[Tensor, Tensor]:
        rows = (first[:, None] + span * SPAN + offsets).clamp_max(len(k) - 1)
        return k[rows], v[rows]

    lengths = tuple(end - start for start, end in itertools.pairwise(starts))
    return _attend(q, k.shape[1], starts, lengths, gather, scale, window, softcap)


@dataclass(frozen=True)
class _Tiles:
    """Tiles of equal size. rows: [n, size] query rows (-1: padding); positions: [n, size] of those rows in their sequence;
    sequence, first, length: [n] number, first row and context length of the sequence; lowest, highest: host positions."""

    size: int
    rows: Tensor
    positions: Tensor
    sequence: Tensor
    first: Tensor
    length: Tensor
    lowest: tuple[int, ...]
    highest: tuple[int, ...]


@functools.lru_cache(maxsize=8)
def _tiles_of(starts: tuple[int, ...], lengths: tuple[int, ...], sizes: tuple[int, ...]) -> list[_Tiles]:
    """Cut every sequence's rows into tiles, largest size first; what is left over is padded to TILE rows."""
    groups: dict[int, list[tuple[int, int, int]]] = {}
    for sequence, (start, end) in enumerate(itertools.pairwise(starts)):
        while start < end:
            left = end - start
            size = next((size for size in sizes if size <= left and (size > 1 or left == 1)), TILE)
            count = min(size, left)
            groups.setdefault(size, []).append((sequence, start, count))
            start += count
    out = []
    for size, tiles in groups.items():
        rows = torch.tensor([[r if r < start + n else -1 for r in range(start, start + size)] for _, start, n in tiles])
        sequence = torch.tensor([s for s, _, _ in tiles])
        shift = [lengths[s] - starts[s + 1] for s, _, _ in tiles]
        out.append(
            _Tiles(
                size=size,
                rows=rows,
                positions=torch.where(rows < 0, -1, rows + torch.tensor(shift)[:, None]),
                sequence=sequence,
                first=torch.tensor([starts[s] for s, _, _ in tiles]),
                length=torch.tensor([lengths[s] for s, _, _ in tiles]),
                lowest=tuple(start + move for (_, start, _), move in zip(tiles, shift, strict=True)),
                highest=tuple(start + n - 1 + move for (_, start, n), move in zip(tiles, shift, strict=True)),
            )
        )
    return out


def _attend(
    q: Tensor,
    kv_heads: int,
    starts: tuple[int, ...],
    lengths: tuple[int, ...],
    gather: Gather,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    _, heads, size = q.shape
    out = torch.zeros_like(q)
    grouped = heads // kv_heads
    for tiles in _tiles_of(starts, lengths, tile_sizes(grouped, size, torch.get_num_threads())):
        most = max(1, MOST_GATHERED // (SPAN * kv_heads * size))
        for start in range(0, len(tiles.rows), most):
            part = slice(start, start + most)
            rows = tiles.rows[part]
            queries = q[rows.clamp_min(0)].float() * scale
            # [n, tile, H, D] -> [n, K, grouped * tile, D]: the heads that share keys stand side by side
            queries = queries.unflatten(2, (kv_heads, grouped)).permute(0, 2, 3, 1, 4).flatten(2, 3)
            result = _fold_spans(queries, tiles, part, gather, window, softcap)
            result = result.unflatten(2, (grouped, tiles.size)).permute(0, 3, 1, 2, 4).flatten(2, 3)
            real = rows >= 0
            out[rows[real]] = result[real].to(q.dtype)
    return out


def _fold_spans(
    queries: Tensor, tiles: _Tiles, part: slice, gather: Gather, window: int | None, softcap: float | None
) -> Tensor:
    """queries [n, K, M, D], M = grouped * tile -> attention output of the same shape, float32."""
    count = len(queries)
    lowest, highest = tiles.lowest[part], tiles.highest[part]
    positions, lengths = tiles.positions[part], tiles.length[part]
    best = queries.new_full(queries.shape[:3], -torch.inf)
    total = queries.new_zeros(queries.shape[:3])
    out = torch.zeros_like(queries)
    for span in range(max(highest) // SPAN + 1):
        begin, end = span * SPAN, (span + 1) * SPAN
        seen = [
            n
            for n in range(count)
            if highest[n] >= begin and (window is None or lowest[n] - window + 1 < end)
        ]
        if not seen:
            continue
        pick = torch.tensor(seen) if len(seen) < count else slice(None)
        k, v = gather(tiles.sequence[part][pick], tiles.first[part][pick], span)
        key_positions = torch.arange(begin, end)
        # What lies beyond a sequence's end is another's, or stale: never let it into a product.
        stale = (key_positions >= lengths[pick][:, None])[:, :, None, None]
        k, v = k.float().masked_fill(stale, 0).permute(0, 2, 3, 1), v.float().masked_fill(stale, 0).permute(0, 2, 1, 3)
        scores = _product(queries[pick], k)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = positions[pick][:, :, None] - key_positions
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        hidden = hidden.repeat(1, queries.shape[2] // tiles.size, 1)[:, None]
        scores = scores.masked_fill(hidden, -torch.inf)
        old = best[pick]
        new = torch.maximum(old, scores.amax(-1))
        safe = new.masked_fill(new == -torch.inf, 0)
        weights = torch.exp(scores - safe[..., None])
        fade = torch.exp(old - safe)
        best[pick] = new
        total[pick] = total[pick] * fade + weights.sum(-1)
        out[pick] = out[pick] * fade[..., None] + _product(weights, v)
    return out / total.clamp_min(torch.finfo(torch.float32).tiny)[..., None]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """[n, K, M, I] times [n, K, I, O], each of the n * K products by itself.

    Two things let a BLAS sum in another order and are kept from it: a single row (a batch of products with M = 1 is not
    bound by MKL's strict mode), and an operand stored transposed (whether `flatten` of a permuted tensor copies it
    depends on n).
    """
    count, heads, rows, _ = left.shape
    if rows == 1:
        left = left.expand(-1, -1, 2, -1)
    product = torch.bmm(left.flatten(0, 1).contiguous(), right.flatten(0, 1).contiguous())
    return product[:, :rows].unflatten(0, (count, heads))


@functools.cache
def tile_sizes(grouped: int, size: int, threads: int) -> tuple[int, ...]:
    """The tile sizes, largest first, whose two products agree bit for bit with those of TILE rows."""
    del threads  # part of the key: a BLAS may split its work by it
    rows = max(OTHER_TILES)

    def agrees(tile: int, inner: int, columns: int) -> bool:
        left, right = cancelling(rows * grouped, inner, columns, torch.float32)

        def product(tile: int) -> Tensor:
            # as in _attend: the heads of a group one after the other, each with its tile of rows
            tiles = left.view(-1, tile, grouped, inner).transpose(1, 2).reshape(-1, 1, grouped * tile, inner)
            out = _product(tiles, right.expand(len(tiles), 1, inner, columns))
            return out.view(-1, grouped, tile, columns).transpose(1, 2).reshape(-1, columns)

        return torch.equal(product(tile), product(TILE))

    agreeing = [tile for tile in OTHER_TILES if agrees(tile, size, SPAN) and agrees(tile, SPAN, size)]
    return tuple(sorted([*agreeing, TILE], reverse=True))
