"""The contract of the operations: row r of a result depends on row r only, whatever the rows beside it, the chunks and the
number of threads. And the facts about torch that the reference implementation is built on.

`torch.equal` throughout: nothing here is "close".
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quire import ops
from quire.ops.reference.trial import cancelling
from tests.ops.shapes import ATTENTION, CHUNKS, DTYPES, LINEAR, THREADS, AttentionShape, borders, threads

ROWS = 131


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_exact_by_row(compute: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """compute(any run of rows of x) == those rows of compute(x), for any number of threads."""
    with threads(1):
        expected = compute(x)
    for count in THREADS:
        with threads(count):
            assert torch.equal(compute(x), expected), f"{count} threads"
            for chunks in CHUNKS:
                for start, end in borders(len(x), chunks):
                    assert torch.equal(compute(x[start:end]), expected[start:end]), f"rows {start}:{end}"
            # The same rows in company that they have not seen, in another order.
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(count))
            assert torch.equal(compute(x[order]), expected[order])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs,outputs", LINEAR)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
    weight = random(outputs, inputs, dtype=dtype, seed=1)
    shift = random(outputs, dtype=dtype, seed=2) if bias else None
    assert_exact_by_row(lambda x: ops.linear(x, weight, shift), random(ROWS, inputs, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs,outputs", LINEAR)
def test_linear_on_sums_that_cancel(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """Where nothing but the order of summation is left of the result."""
    x, weight = cancelling(ROWS, inputs, outputs, dtype)
    assert_exact_by_row(lambda x: ops.linear(x, weight.t().contiguous()), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 48, 1000, 4096])
def test_norms(size: int, dtype: torch.dtype) -> None:
    x, weight, bias = random(ROWS, size, dtype=dtype), random(size, dtype=dtype, seed=1), random(size, dtype=dtype, seed=2)
    assert_exact_by_row(lambda x: ops.rms_norm(x, weight, 1e-6, 1.0), x)
    assert_exact_by_row(lambda x: ops.layer_norm(x, weight, bias, 1e-5), x)
    assert_exact_by_row(lambda x: ops.layer_norm(x, None, None, 1e-5), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_each_head(dtype: torch.dtype) -> None:
    weight = random(20, dtype=dtype, seed=1)
    assert_exact_by_row(lambda x: ops.rms_norm(x, weight, 1e-6), random(ROWS, 3, 20, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 80, 1001])
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activations(kind: str, size: int, dtype: torch.dtype) -> None:
    x = random(ROWS, 2 * size, dtype=dtype) * 3
    assert_exact_by_row(lambda x: ops.activation(x, kind), x)
    # Halves of one product, as Phi-3 has them: rows that do not lie end to end.
    assert_exact_by_row(lambda x: ops.gated_activation(x[:, :size], x[:, size:], kind), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("half,size", [(6, 12), (3, 14), (32, 64)])
def test_rope(half: int, size: int, dtype: torch.dtype) -> None:
    angles = torch.arange(ROWS)[:, None] * random(half).abs()
    x = random(ROWS, 3, size, dtype=dtype).flatten(1)

    def compute(rows: Tensor) -> Tensor:
        turned, rows = rows[:, -half:], rows[:, :-half].unflatten(1, (3, size)).to(dtype)
        return ops.rope(rows, torch.cos(turned), torch.sin(turned))

    assert_exact_by_row(compute, torch.cat([x.float(), angles], 1))


@pytest.mark.parametrize("name", ["exp", "tanh", "erf", "rsqrt", "cos", "sin", "log"])
def test_functions_that_treat_every_element_alike(name: str) -> None:
    """What rows.py and rope.py are composed of."""
    function = getattr(torch, name)
    x = random(4099).abs() * 5 + 1e-3
    expected = function(x)
    for count in THREADS:
        with threads(count):
            for start in (0, 1, 3, 8, 17):
                for size in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 1000):
                    end = start + size
                    assert torch.equal(function(x[start:end].clone()), expected[start:end])
                    assert torch.equal(function(x[start:end]), expected[start:end])
            assert torch.equal(function(x.repeat(50)), expected.repeat(50))


def test_sums_over_the_last_dimension_treat_every_row_alike() -> None:
    for size in (1, 7, 128, 1000, 5120):
        assert_exact_by_row(lambda x: torch.stack([x.sum(-1), x.mean(-1), x.amax(-1)], 1), random(ROWS, size))


def test_functions_that_treat_the_tail_of_a_tensor_otherwise() -> None:
    """Why rows.py does not use them. Should this ever fail, torch has become simpler and so may rows.py."""
    x = random(4099) * 3
    functions = {
        "sigmoid": torch.sigmoid,
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "pow": lambda x: x.abs() ** 1.7,
    }
    uneven = [
        name
        for name, function in functions.items()
        if any(not torch.equal(function(x[:size].clone()), function(x)[:size]) for size in range(1, 64))
    ]
    if not uneven and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"):
        pytest.skip("this machine has no vector units that torch uses")
    assert uneven


def cache_of(k: Tensor, v: Tensor, shape: AttentionShape, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values in shuffled blocks of a pool that is NaN elsewhere, and the sequence's block table [1, blocks]."""
    blocks = math.ceil(len(k) / shape.block)
    pool = (blocks + 4, shape.block, shape.kv_heads, shape.size)
    keys, values = torch.full(pool, torch.nan, dtype=k.dtype), torch.full(pool, torch.nan, dtype=k.dtype)
    table = 1 + torch.randperm(blocks + 3, generator=torch.Generator().manual_seed(seed))[:blocks]
    places = torch.arange(len(k))
    ops.write_kv(keys, values, k, v, table[places // shape.block] * shape.block + places % shape.block)
    return keys, values, table[None]


def qkv(count: int, shape: AttentionShape, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    q = random(count, shape.heads, shape.size, dtype=dtype, seed=seed)
    k, v = (random(count, shape.kv_heads, shape.size, dtype=dtype, seed=seed + n) for n in (1000, 2000))
    return q * 2, k, v


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ATTENTION, ids=str)
def test_attention_in_chunks(shape: AttentionShape, dtype: torch.dtype) -> None:
    """Packed, paged in one piece, paged in chunks of any sizes: the same bits, and no NaN out of stale slots."""
    total = 200
    q, k, v = qkv(total, shape, dtype, seed=3)
    options = {"scale": shape.size**-0.5, "window": shape.window, "softcap": shape.softcap}
    with threads(1):
        expected = ops.packed_attention(q, k, v, (0, total), **options)
    assert expected.isfinite().all()
    for count in THREADS:
        with threads(count):
            assert torch.equal(ops.packed_attention(q, k, v, (0, total), **options), expected)
            for seed, chunks in enumerate(CHUNKS[count - 1 :: len(THREADS)]):
                keys, values, table = cache_of(k, v, shape, seed)
                for start, end in borders(total, chunks):
                    # Slots past `end` are another's or stale: what is there must not matter.
                    args = keys, values, table, (0, end - start), (end,)
                    assert torch.equal(ops.paged_attention(q[start:end], *args, **options), expected[start:end])


@pytest.mark.parametrize("shape", ATTENTION, ids=str)
def test_attention_ignores_slots_past_the_length(shape: AttentionShape) -> None:
    """A block that is half written holds NaN after its last token, and the table's padding points at block 0."""
    q, k, v = qkv(21, shape, torch.float32, seed=4)
    options = {"scale": shape.size**-0.5, "window": shape.window, "softcap": shape.softcap}
    keys, values, table = cache_of(k, v, shape, seed=1)
    padded = torch.nn.functional.pad(table, (0, 40))
    full = ops.packed_attention(q, k, v, (0, 21), **options)
    out = ops.paged_attention(q[-5:], keys, values, padded, (0, 5), (21,), **options)
    assert torch.equal(out, full[-5:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ATTENTION, ids=str)
def test_attention_in_company(shape: AttentionShape, dtype: torch.dtype) -> None:
    """A sequence's rows are the same alone and beside any others: decoding rows, chunks and whole prompts in one call."""
    lengths, news = (1, 40, 129, 17, 160, 64, 33), (1, 1, 129, 5, 9, 64, 1)
    parts = [qkv(length, shape, dtype, seed=10 * n) for n, length in enumerate(lengths)]
    options = {"scale": shape.size**-0.5, "window": shape.window, "softcap": shape.softcap}
    alone = [ops.packed_attention(*part, (0, len(part[0])), **options) for part in parts]
    starts = tuple(torch.tensor([0, *lengths]).cumsum(0).tolist())
    together = ops.packed_attention(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)), starts, **options)
    assert torch.equal(together, torch.cat(alone))

    caches = [cache_of(part[1], part[2], shape, n) for n, part in enumerate(parts)]
    keys, values = (torch.cat([cache[n] for cache in caches]) for n in (0, 1))
    tables, first, widest = [], 0, max(cache[2].shape[1] for cache in caches)
    for cache in caches:
        tables.append(torch.nn.functional.pad(cache[2] + first, (0, widest - cache[2].shape[1])))
        first += len(cache[0])
    for order in ([0, 1, 2, 3, 4, 5, 6], [6, 4, 1], [5, 2, 0, 3]):
        q = torch.cat([parts[n][0][lengths[n] - news[n] :] for n in order])
        starts = tuple(torch.tensor([0, *(news[n] for n in order)]).cumsum(0).tolist())
        table, length = torch.cat([tables[n] for n in order]), tuple(lengths[n] for n in order)
        out = ops.paged_attention(q, keys, values, table, starts, length, **options)
        assert torch.equal(out, torch.cat([alone[n][lengths[n] - news[n] :] for n in order]))
