"""AMX's tiles, where there are some, give the bits that their emulation gives: products, attention, and gradients of both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quire.ops import cpu
from quire.ops.cpu import library
from tests.ops.test_native_linear import random, weight_of

pytestmark = pytest.mark.skipif("amx" not in library.isas(), reason="no AMX")
ROWS = (1, 7, 16, 17, 33, 150, 600)


def both(compute: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """What tiles and emulation give."""
    best, results = library.isa(), []
    for name in ("amx", "amx-emulated"):
        library.set_isa(name)
        results.append(compute())
    library.set_isa(best)
    return results[0], results[1]


@pytest.mark.parametrize("form", ["bfloat16", "fp8", "int8", "int4"])
@pytest.mark.parametrize("rows", ROWS)
def test_products(form: str, rows: int) -> None:
    packed, x = cpu.pack(weight_of(form, 330, 896)), random(rows, 896).to(torch.bfloat16)
    tiles, emulated = both(lambda: cpu.packed_linear(x, packed))
    assert torch.equal(tiles, emulated)


@pytest.mark.parametrize("rows", ROWS)
def test_gradients(rows: int) -> None:
    packed, dy = cpu.pack(weight_of("bfloat16", 330, 200)), random(rows, 330).to(torch.bfloat16)
    tiles, emulated = both(lambda: cpu.packed_linears_backward([dy], [packed], torch.float32))
    assert torch.equal(tiles, emulated)


@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("rows", ROWS)
def test_attention(size: int, rows: int) -> None:
    q = random(rows, 7 * size).to(torch.bfloat16).unflatten(1, (7, size))
    k, v = (random(rows, size, seed=seed).to(torch.bfloat16).unsqueeze(1) for seed in (1, 2))
    tiles, emulated = both(lambda: cpu.packed_attention(q, k, v, (0, rows), scale=size**-0.5, window=None, softcap=None))
    assert torch.equal(tiles, emulated)


@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("rows", ROWS)
def test_gradients_of_attention(size: int, rows: int) -> None:
    dy, q = (random(rows, 7 * size, seed=seed).to(torch.bfloat16).unflatten(1, (7, size)) for seed in (3, 4))
    k, v = (random(rows, size, seed=seed).to(torch.bfloat16).unsqueeze(1) for seed in (1, 2))
    tiles, emulated = both(
        lambda: torch.cat(cpu.packed_attention_backward(dy, q, k, v, (0, rows), size**-0.5, None, None), dim=1)
    )
    assert torch.equal(tiles, emulated)
