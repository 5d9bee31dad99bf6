"""A cache of one byte per number: what is stored, what is read, and that neither depends on company or chunks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quire import ops
from tests.ops.shapes import ATTENTION, CHUNKS, AttentionShape, borders, exact_attention, threads

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
TYPES = tuple(LARGEST)
BLOCK = 16


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def every_number(dtype: torch.dtype) -> Tensor:
    """All finite numbers of a type, ascending, as float64."""
    if dtype == torch.int8:
        return torch.arange(-127, 128, dtype=torch.float64)
    values = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    return values[values.isfinite()].unique()


def nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest number of the type to each of x (float64): ties to the one whose last bit is 0, beyond the ends the ends."""
    numbers = every_number(dtype)
    above = torch.searchsorted(numbers, x.clamp(numbers[0], numbers[-1])).clamp(1, len(numbers) - 1)
    low, high = numbers[above - 1], numbers[above]
    even = (low if dtype == torch.int8 else low.to(dtype).view(torch.uint8)) % 2 == 0
    lower = (x - low < high - x) | ((x - low == high - x) & even)
    return torch.where(lower, low, high)


def stored(k: Tensor, dtype: torch.dtype, scales: Tensor | None) -> Tensor:
    """k [T, K, D] as the cache holds it, float64."""
    slots = -(-len(k) // BLOCK) * BLOCK
    keys, values = (torch.zeros(slots // BLOCK, BLOCK, *k.shape[1:], dtype=dtype) for _ in range(2))
    ops.write_kv(keys, values, k, k, torch.arange(len(k)), scales)
    return keys.flatten(0, 1)[: len(k)].double()


@pytest.mark.parametrize("dtype", TYPES)
def test_the_nearest_number_is_stored(dtype: torch.dtype) -> None:
    """Among them every number of the type, the middles between neighbours, what is beyond the largest, and tiny ones."""
    numbers = every_number(dtype)
    middles = (numbers[1:] + numbers[:-1]) / 2
    drawn = random(6000).double() * torch.tensor([50.0, 0.01]).repeat_interleave(3000)
    x = torch.cat([numbers, middles, middles * (1 + 2**-20), numbers * 2, drawn])
    x = x[: len(x) // 6 * 6].float().view(-1, 2, 3)
    assert torch.equal(stored(x, dtype, None), nearest(x.double(), dtype))


@pytest.mark.parametrize("dtype", TYPES)
def test_each_head_has_its_scale_for_keys_and_for_values(dtype: torch.dtype) -> None:
    k, v = random(40, 3, 7) * 30, random(40, 3, 7, seed=1)
    scales = torch.tensor([[0.5, 0.013, 1.0], [2.0, 0.01, 0.3]])
    keys, values = (torch.zeros(3, BLOCK, 3, 7, dtype=dtype) for _ in range(2))
    ops.write_kv(keys, values, k, v, torch.arange(40), scales)
    for cache, rows, scale in ((keys, k, scales[0]), (values, v, scales[1])):
        expected = nearest((rows / scale[:, None]).double(), dtype)
        assert torch.equal(cache.flatten(0, 1)[:40].double(), expected)


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_not_finite(dtype: torch.dtype) -> None:
    """Infinity is the largest number; a NaN stays one, so that the engine finds it, but in int8, which has none."""
    x = torch.tensor([[[math.inf, -math.inf, math.nan, 1e38]]]).expand(2, 1, 4)
    row = stored(x, dtype, None)[0, 0]
    largest = LARGEST[dtype]
    assert row[[0, 1, 3]].tolist() == [largest, -largest, largest]
    assert row[2] == 0 if dtype == torch.int8 else row[2].isnan()


@pytest.mark.parametrize("dtype", TYPES)
def test_bfloat16_rows_are_stored_as_their_float32(dtype: torch.dtype) -> None:
    x = (random(50, 2, 5) * 20).bfloat16()
    assert torch.equal(stored(x, dtype, None), stored(x.float(), dtype, None))


def cache_of(k: Tensor, v: Tensor, shape: AttentionShape, dtype: torch.dtype, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values in shuffled blocks of a pool that is poison elsewhere, and the sequence's block table."""
    blocks = math.ceil(len(k) / shape.block)
    pool = (blocks + 4, shape.block, shape.kv_heads, shape.size)
    keys, values = (torch.full(pool, 0x7F, dtype=torch.uint8).view(dtype) for _ in range(2))
    table = 1 + torch.randperm(blocks + 3, generator=torch.Generator().manual_seed(len(k)))[:blocks]
    places = torch.arange(len(k))
    ops.write_kv(keys, values, k, v, table[places // shape.block] * shape.block + places % shape.block, scales)
    return keys, values, table[None]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", ATTENTION, ids=str)
def test_attention_over_what_was_stored(shape: AttentionShape, dtype: torch.dtype) -> None:
    """The formula in float64 over stored * scale; then the same bits in chunks of any sizes, for any number of threads."""
    total = 200
    q = random(total, shape.heads, shape.size)
    k, v = (random(total, shape.kv_heads, shape.size, seed=n) for n in (1, 2))
    scales = (random(2, shape.kv_heads, seed=3).abs() + 0.5) * 4 / LARGEST[dtype]
    keys, values, table = cache_of(k, v, shape, dtype, scales)
    options = {"scale": shape.size**-0.5, "window": shape.window, "softcap": shape.softcap, "scales": scales}
    whole = ops.paged_attention(q, keys, values, table, (0, total), (total,), **options)

    read = [nearest((x / s[:, None]).double(), dtype) * s[:, None].double() for x, s in zip((k, v), scales, strict=True)]
    expected = exact_attention(q.double(), *read, shape)
    assert (whole.double() - expected).abs().max() <= 4e-6 * expected.abs().max().clamp_min(1)
    for count in (1, 2):
        with threads(count):
            for chunks in CHUNKS:
                for start, end in borders(total, chunks):
                    part = ops.paged_attention(q[start:end], keys, values, table, (0, end - start), (end,), **options)
                    assert torch.equal(part, whole[start:end]), (count, start, end)


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_are_stored_alike_in_any_company(dtype: torch.dtype) -> None:
    """Vector bodies and scalar tails of a conversion must agree."""
    x = random(131, 3, 7) * 100
    scales = torch.tensor([[0.7, 0.1, 1.3]] * 2)
    whole = stored(x, dtype, scales)
    for chunks in CHUNKS:
        for start, end in borders(len(x), chunks):
            assert torch.equal(stored(x[start:end], dtype, scales), whole[start:end])
