"""The native gradients of attention on every instruction set that this machine can run: against float64, and the same bits for
any number of threads and in any company."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from quire import ops
from quire.ops import cpu
from quire.ops.cpu import library
from tests.ops.shapes import ATTENTION, AttentionShape, exact_attention, threads
from tests.ops.test_native_attention import PAIRED

LENGTHS = (1, 5, 48, 49, 130, 271)
STARTS = tuple(itertools.accumulate(LENGTHS, initial=0))


@pytest.fixture(params=library.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best = library.isa()
    library.set_isa(request.param)
    yield request.param
    library.set_isa(best)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten, in its result or in its own memory, is NaN."""
    nan = torch.full((300, 2, 128), torch.nan)
    for count in (2, 1):
        with threads(count):
            cpu.packed_attention_backward(nan, nan, nan, nan, (0, 300), 1.0, None, None)
    monkeypatch.setattr(torch, "empty", lambda shape, dtype: torch.full(shape, torch.nan, dtype=dtype))


def random(rows: int, heads: int, size: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Rows of heads that do not lie end to end."""
    wide = torch.randn(rows, heads, size + 3, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return wide[..., :size]


def case(shape: AttentionShape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dy, q, k, v."""
    counts = shape.heads, shape.heads, shape.kv_heads, shape.kv_heads
    return tuple(random(STARTS[-1], heads, shape.size, seed, dtype) for seed, heads in enumerate(counts))


def gradients(shape: AttentionShape, tensors: tuple[Tensor, ...], starts: tuple[int, ...]) -> tuple[Tensor, ...]:
    return cpu.packed_attention_backward(*tensors, starts, shape.size**-0.5, shape.window, shape.softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ATTENTION, ids=str)
@pytest.mark.usefixtures("poison")
def test_gradients(isa: str, shape: AttentionShape, dtype: torch.dtype) -> None:
    """Pairs of bfloat16 have weights and gradients of scores rounded to it."""
    paired = isa in PAIRED and dtype == torch.bfloat16 and shape.softcap is None
    allowed = 2**-8 if paired else 3e-6
    tensors = case(shape, dtype)
    found = gradients(shape, tensors, STARTS)
    for start, end in itertools.pairwise(STARTS):
        dy, *leaves = (t[start:end].double() for t in tensors)
        leaves = [leaf.requires_grad_() for leaf in leaves]
        exact = torch.autograd.grad(exact_attention(*leaves, shape), leaves, dy)
        for got, expected in zip(found, exact, strict=True):
            size = expected.abs().amax().clamp_min(1e-3)
            rounding = expected.abs() * torch.finfo(dtype).eps
            assert ((got[start:end].double() - expected).abs() <= allowed * size + rounding).all()
        alone = gradients(shape, tuple(t[start:end] for t in tensors), (0, end - start))
        assert all(torch.equal(one, all_of[start:end]) for one, all_of in zip(alone, found, strict=True))
    with threads(2):
        assert all(torch.equal(*pair) for pair in zip(gradients(shape, tensors, STARTS), found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_in_its_sequence(isa: str, dtype: torch.dtype) -> None:
    shape = ATTENTION[1]
    tensors = case(shape, dtype)
    clean = gradients(shape, tensors, STARTS)
    tensors[2][STARTS[4] + 3] = torch.nan
    for got, expected in zip(gradients(shape, tensors, STARTS), clean, strict=True):
        assert torch.equal(got[: STARTS[4]], expected[: STARTS[4]])
        assert torch.equal(got[STARTS[5] :], expected[STARTS[5] :])
        assert got[STARTS[4] : STARTS[5]].isnan().any()


def test_fused_instruction_sets_agree_to_the_bit() -> None:
    best, results = library.isa(), []
    tensors = case(ATTENTION[3], torch.bfloat16)
    for name in library.isas():
        if name not in ("generic", *PAIRED):
            library.set_isa(name)
            results.append(gradients(ATTENTION[3], tensors, STARTS))
    library.set_isa(best)
    for one in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(one, results[0], strict=True))


def test_autograd_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a dy whose numbers are one in memory, and without rows."""
    monkeypatch.setattr(ops, "selected", lambda: cpu)
    shape = ATTENTION[0]
    dy, *tensors = case(shape, torch.float32)
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = ops.packed_attention(*leaves, STARTS, scale=shape.size**-0.5)
    for given in (dy, torch.ones(1, 1, 1).expand_as(dy)):
        found = torch.autograd.grad(out, leaves, given, retain_graph=True)
        expected = gradients(shape, (given.contiguous(), *tensors), STARTS)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    nothing = [t[:0] for t in (dy, *tensors)]
    assert all(len(one) == 0 for one in gradients(shape, tuple(nothing), (0,)))
