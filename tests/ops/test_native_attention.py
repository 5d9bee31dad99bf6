"""The native attention and cache kernels on every instruction set that this machine can run: against float64, in every type
of cache, with poison wherever nothing was written, and to the bit however a batch is cut.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.ops import cpu
from quire.ops.cpu import attention, library
from tests.ops.shapes import CHUNKS, AttentionShape, borders, exact_attention, threads

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUANTIZED = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
PAIRED = ("amx", "amx-emulated", "avx512_bf16")
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
SHAPES = (
    AttentionShape(14, 2, 64, block=16),
    AttentionShape(1, 1, 1, block=1),
    AttentionShape(4, 4, 80, window=33, block=8),
    AttentionShape(8, 2, 96, softcap=2.5, block=128),
    AttentionShape(5, 5, 7, window=150, softcap=3.0, block=7),
    AttentionShape(26, 2, 128, block=16),
    AttentionShape(2, 1, 256, window=1, block=32),
    AttentionShape(3, 1, 45, block=16),
)


@pytest.fixture(params=library.isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best = library.isa()
    library.set_isa(request.param)
    yield request.param
    library.set_isa(best)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten is NaN."""
    monkeypatch.setattr(attention.torch, "empty_like", lambda x, **_: torch.full(x.shape, torch.nan, dtype=x.dtype))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(count: int, shape: AttentionShape, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    q = random(count, shape.heads, shape.size, seed=seed, dtype=dtype) * 2
    k, v = (random(count, shape.kv_heads, shape.size, seed=seed + n, dtype=dtype) for n in (100, 200))
    return q, k, v


def options_of(shape: AttentionShape) -> dict[str, Any]:
    return {"scale": shape.size**-0.5, "window": shape.window, "softcap": shape.softcap}


def poisoned(blocks: int, shape: AttentionShape, dtype: torch.dtype) -> list[Tensor]:
    pool = (blocks, shape.block, shape.kv_heads, shape.size)
    if dtype.itemsize == 1:  # 0x7f: NaN, or the largest integer
        return [torch.full(pool, 0x7F, dtype=torch.uint8).view(dtype) for _ in range(2)]
    return [torch.full(pool, torch.nan, dtype=dtype) for _ in range(2)]


def cache_of(
    k: Tensor, v: Tensor, shape: AttentionShape, dtype: torch.dtype, seed: int = 1, scales: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values in shuffled blocks of a pool that is poison elsewhere, and the sequence's block table [1, blocks + 2],
    which ends in blocks that do not exist."""
    blocks = math.ceil(len(k) / shape.block)
    keys, values = poisoned(blocks + 4, shape, dtype)
    table = 1 + torch.randperm(blocks + 3, generator=torch.Generator().manual_seed(seed))[:blocks]
    places = torch.arange(len(k))
    cpu.write_kv(keys, values, k, v, table[places // shape.block] * shape.block + places % shape.block, scales)
    return keys, values, torch.nn.functional.pad(table, (0, 2), value=-1)[None]


def assert_near(got: Tensor, exact: Tensor) -> None:
    assert not got.isnan().any()
    steps = {torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[got.dtype]
    assert (got.double() - exact).abs().max() <= steps * exact.abs().max().clamp_min(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(isa: str, shape: AttentionShape, dtype: torch.dtype) -> None:
    """Packed and paged in every cache type that holds the rows exactly: near float64, and the same bits. AVX512_BF16 and
    AMX sum pairs where the cache is bfloat16, too."""
    total = 300
    q, k, v = qkv(total, shape, dtype)
    exact = exact_attention(q.double(), k.double(), v.double(), shape)
    expected = cpu.packed_attention(q, k, v, (0, total), **options_of(shape))
    assert_near(expected, exact)
    for cached in {dtype} if isa in PAIRED else {dtype, torch.float32}:
        keys, values, table = cache_of(k, v, shape, cached)
        out = cpu.paged_attention(q, keys, values, table, (0, total), (total,), **options_of(shape))
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_over_a_quantized_cache(shape: AttentionShape, dtype: torch.dtype) -> None:
    total = 150
    q, k, v = qkv(total, shape, torch.bfloat16)
    scales = (random(2, shape.kv_heads, seed=3).abs() + 0.5) * 4 / LARGEST[dtype]
    keys, values, table = cache_of(k, v, shape, dtype, scales=scales)
    places = torch.arange(total)
    slots = table[0][places // shape.block] * shape.block + places % shape.block
    read = [
        cache.view(-1, *cache.shape[2:]).float()[slots].double() * scale[:, None].double()
        for cache, scale in zip((keys, values), scales, strict=True)
    ]
    options = {**options_of(shape), "scales": scales}
    out = cpu.paged_attention(q, keys, values, table, (0, total), (total,), **options)
    assert_near(out, exact_attention(q.double(), *read, shape))
    for start, end in borders(total, (1, 1, 30, 100)):
        part = cpu.paged_attention(q[start:end], keys, values, table, (0, end - start), (end,), **options)
        assert torch.equal(part, out[start:end])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_and_threads_change_nothing(shape: AttentionShape, dtype: torch.dtype) -> None:
    """Each chunk reads a cache into which only the tokens up to its end were written."""
    total = 280
    q, k, v = qkv(total, shape, dtype, seed=5)
    with threads(1):
        expected = cpu.packed_attention(q, k, v, (0, total), **options_of(shape))
    for count in (1, 2):
        with threads(count):
            assert torch.equal(cpu.packed_attention(q, k, v, (0, total), **options_of(shape)), expected)
            for chunks in CHUNKS[count - 1 :: 2]:
                for start, end in borders(total, chunks):
                    keys, values, table = cache_of(k[:end], v[:end], shape, dtype)
                    args = q[start:end], keys, values, table, (0, end - start), (end,)
                    assert torch.equal(cpu.paged_attention(*args, **options_of(shape)), expected[start:end])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_company_changes_nothing(shape: AttentionShape) -> None:
    """Decoding rows, chunks, whole prompts and sequences without rows, in any order, beside each other."""
    lengths, news = (1, 40, 129, 17, 260, 64, 333, 200), (1, 1, 129, 5, 9, 64, 1, 0)
    parts = [qkv(length, shape, torch.bfloat16, seed=10 * n) for n, length in enumerate(lengths)]
    alone = [cpu.packed_attention(*part, (0, len(part[0])), **options_of(shape)) for part in parts]
    starts = tuple(itertools.accumulate(lengths, initial=0))
    together = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    assert torch.equal(cpu.packed_attention(*together, starts, **options_of(shape)), torch.cat(alone))

    caches = [cache_of(part[1], part[2], shape, torch.bfloat16, n) for n, part in enumerate(parts)]
    keys, values = (torch.cat([cache[n] for cache in caches]) for n in (0, 1))
    firsts = itertools.accumulate((len(cache[0]) for cache in caches), initial=0)
    widest = max(cache[2].shape[1] for cache in caches)
    tables = [
        torch.nn.functional.pad(cache[2] + first, (0, widest - cache[2].shape[1]))
        for cache, first in zip(caches, firsts, strict=False)
    ]
    for order, count in itertools.product(([0, 1, 2, 3, 4, 5, 6, 7], [6, 7, 4, 1], [5, 2, 0, 3]), (1, 2)):
        q = torch.cat([parts[n][0][lengths[n] - news[n] :] for n in order])
        starts = tuple(itertools.accumulate((news[n] for n in order), initial=0))
        table, length = torch.cat([tables[n] for n in order]), tuple(lengths[n] for n in order)
        with threads(count):
            out = cpu.paged_attention(q, keys, values, table, starts, length, **options_of(shape))
        assert torch.equal(out, torch.cat([alone[n][lengths[n] - news[n] :] for n in order]))


def test_rows_that_do_not_lie_end_to_end() -> None:
    """q, k and v as parts of one projection."""
    shape = SHAPES[0]
    q, k, v = qkv(150, shape, torch.bfloat16)
    joined = torch.cat([q, k, v], 1)
    parts = joined.split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
    expected = cpu.packed_attention(q, k, v, (0, 20, 150), **options_of(shape))
    assert torch.equal(cpu.packed_attention(*parts, (0, 20, 150), **options_of(shape)), expected)


def test_a_long_context() -> None:
    """A key far away still counts, and later ones fold into the same maximum."""
    shape = AttentionShape(2, 1, 64)
    q, k, v = qkv(5000, shape, torch.float32)
    k[7] = q[-1, 0] * 2
    weights = torch.einsum("hd,sd->hs", q[-1].double(), k[:, 0].double() * 64**-0.5).softmax(-1)
    exact = (weights @ v[:, 0].double())[None]
    keys, values, table = cache_of(k, v, shape, torch.float32)
    assert_near(cpu.paged_attention(q[-1:], keys, values, table, (0, 1), (5000,), **options_of(shape)), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cached", [*DTYPES, *QUANTIZED])
def test_rotation_and_cache_write_at_once(cached: torch.dtype, dtype: torch.dtype) -> None:
    """The same bits as `rope` and `write_kv`; k and v stay, and no other slot is touched."""
    shape = AttentionShape(6, 2, 22)
    q, k, v = qkv(131, shape, dtype)
    joined = torch.cat([q, k, v], 1)
    angles = random(131, 8) * 50
    cos, sin = torch.cos(angles), torch.sin(angles)
    slots = torch.randperm(20 * shape.block, generator=torch.Generator().manual_seed(1))[:131]
    scales = random(2, 2).abs() / 20 if cached in QUANTIZED else None
    expected = poisoned(20, shape, cached)
    cpu.write_kv(*expected, cpu.rope(k, cos, sin), v, slots, scales)
    for count in (1, 2):
        with threads(count):
            got, parts = poisoned(20, shape, cached), joined.clone().split([6, 2, 2], 1)
            cpu.rope_and_write(*parts, cos, sin, *got, slots, scales)
            assert torch.equal(parts[0], cpu.rope(q, cos, sin))
            assert torch.equal(parts[1], k)
            assert torch.equal(parts[2], v)
            for ours, theirs in zip(got, expected, strict=True):
                assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def test_what_lies_outside_is_refused() -> None:
    shape = SHAPES[0]
    q, k, v = qkv(20, shape, torch.float32)
    keys, values, table = cache_of(k, v, shape, torch.float32)
    for wrong in (-1, len(keys)):
        with pytest.raises(AssertionError):
            cpu.paged_attention(q, keys, values, torch.full_like(table, wrong), (0, 20), (20,), **options_of(shape))
        with pytest.raises(AssertionError):
            cpu.write_kv(keys, values, k, v, torch.full((20,), wrong * shape.block))


def test_fused_instruction_sets_agree_to_the_bit(isa: str) -> None:
    if isa == "generic":
        pytest.skip("rounds between multiply and add")
    for shape in SHAPES:
        args = *qkv(200, shape, torch.float32), (0, 200)
        got = cpu.packed_attention(*args, **options_of(shape))
        library.set_isa(library.isas()[0])
        assert torch.equal(got, cpu.packed_attention(*args, **options_of(shape)))
        library.set_isa(isa)
