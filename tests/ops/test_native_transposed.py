"""The gradient of products with packed weights on every instruction set that this machine can run: dy W against float64
for every form, and row by row to the bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from quire import ops
from quire.ops import cpu, reference
from quire.ops.cpu import library
from quire.ops.reference.packed import dense_values
from tests.ops.shapes import threads
from tests.ops.test_native_linear import FORMS, random, weight_of

ROWS = 45
SHAPES = [(64, 128), (33, 72), (1, 8), (100, 896), (1100, 40), (513, 31)]
CASES = [(*shape, torch.float32) for shape in SHAPES] + [(*shape, torch.bfloat16) for shape in SHAPES[1:4]]


@pytest.fixture(params=library.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best = library.isa()
    library.set_isa(request.param)
    yield request.param
    library.set_isa(best)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten, in its result or in its own memory, is NaN."""
    weight, nan = cpu.pack(weight_of("float32", 512, 1024)), torch.full((50, 512), torch.nan)
    for count in (2, 1):
        with threads(count):
            cpu.packed_linears_backward([nan], [weight], torch.float32)
    monkeypatch.setattr(torch, "empty", lambda shape, dtype: torch.full(shape, torch.nan, dtype=dtype))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("outputs,inputs,dtype", CASES)
def test_gradient(isa: str, form: str, outputs: int, inputs: int, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    if "int4" in form:
        inputs = -(-inputs // 32) * 32
    weight = weight_of(form, outputs, inputs)
    packed, dy = cpu.pack(weight), random(ROWS, outputs).to(dtype)
    request.getfixturevalue("poison")
    dx = cpu.packed_linears_backward([dy], [packed], dtype)
    wide = dense_values(weight).double()
    expected, size = dy.double() @ wide, dy.double().abs() @ wide.abs()
    rounding = {torch.float32: 0, torch.bfloat16: 2.0**-8}[dtype] * expected.abs()
    assert ((dx.double() - expected).abs() <= 2.0**-24 * (outputs**0.5 * 4 + 2) * size + rounding).all()
    for count in (1, 2):
        with threads(count):
            assert torch.equal(cpu.packed_linears_backward([dy], [packed], dtype), dx)
            for rows in (1, 5, 13):
                parts = [cpu.packed_linears_backward([part], [packed], dtype) for part in dy.split(rows)]
                assert torch.equal(torch.cat(parts), dx), f"{rows} rows at a time, {count} threads"


def test_more_rows_than_a_chunk(isa: str) -> None:
    weight, dy = weight_of("bfloat16", 64, 40), random(900, 64)
    packed = cpu.pack(weight)
    dx = cpu.packed_linears_backward([dy], [packed], torch.float32)
    assert torch.allclose(dx, dy @ weight.values.float(), atol=1e-4)
    assert torch.equal(dx[:ROWS], cpu.packed_linears_backward([dy[:ROWS]], [packed], torch.float32))


def test_several_weights_are_one_sum(isa: str) -> None:
    weights = [
        weight_of(form, outputs, 96) for form, outputs in (("bfloat16", 70), ("int8", 33), ("int4", 64), ("int4 in order", 40))
    ]
    dys = [random(ROWS, weight.shape[0], seed=n) for n, weight in enumerate(weights)]
    packed = [cpu.pack(weight) for weight in weights]
    wide = [dense_values(weight).double() for weight in weights]
    for wanted in itertools.product((False, True), repeat=4):
        if any(wanted):
            given = [dy if want else None for dy, want in zip(dys, wanted, strict=True)]
            expected = sum(dy.double() @ w for dy, w, want in zip(dys, wide, wanted, strict=True) if want)
            got = cpu.packed_linears_backward(given, packed, torch.float32)
            assert torch.allclose(got.double(), expected, atol=1e-3, rtol=1e-5)


def test_gradients_of_another_type_and_apart(isa: str) -> None:
    weight = weight_of("bfloat16", 70, 40)
    packed, dy = cpu.pack(weight), random(ROWS, 100)[:, 9:79]
    got = cpu.packed_linears_backward([dy], [packed], torch.bfloat16)
    assert torch.equal(got, cpu.packed_linears_backward([dy.contiguous()], [packed], torch.float32).bfloat16())
    assert torch.equal(got, cpu.packed_linears_backward([dy.t().contiguous().t()], [packed], torch.bfloat16))


def test_fused_instruction_sets_agree_to_the_bit() -> None:
    best, results = library.isa(), []
    packed, dy = cpu.pack(weight_of("bfloat16", 600, 70)), random(17, 600)
    for name in library.isas():
        if name != "generic":
            library.set_isa(name)
            results.append(cpu.packed_linears_backward([dy], [packed], torch.float32))
    library.set_isa(best)
    assert all(torch.equal(one, results[0]) for one in results)


@pytest.mark.parametrize("form", FORMS)
def test_autograd(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the operations: the forward pass is the same with and without gradients, and they are the reference's."""
    weight, dy = weight_of(form, 40, 96), random(ROWS, 40, seed=7)
    x, bias = random(ROWS, 96), random(40, seed=5)
    found = []
    for module in (cpu, reference):
        monkeypatch.setattr(ops, "selected", lambda module=module: module)
        packed = ops.pack(weight)
        if form in ("bfloat16", "float16"):  # the reference takes no other type
            x, bias, dy = (tensor.to(weight.values.dtype) for tensor in (x, bias, dy))
        leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
        y = ops.packed_linear(leaves[0], packed, leaves[1])
        assert torch.equal(y, ops.packed_linear(x, packed, bias))
        one = torch.autograd.grad(y, leaves, dy)
        several = ops.packed_linears(leaves[0], [packed] * 3, [leaves[1], None, bias])
        both = torch.autograd.grad([several[0], several[2]], leaves, [dy, 2 * dy])
        assert torch.allclose(both[0], 3 * one[0], rtol=2e-2, atol=1e-4)
        assert torch.equal(both[1], one[1])
        found.append(one)
    close = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}[x.dtype]
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=close, atol=close)
