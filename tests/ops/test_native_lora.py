"""The native products of adapters and their gradients on every instruction set that this machine can run: against float64, row
by row to the bit, for ragged ranks, odd sizes and rows of many slots in any order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from quire import ops
from quire.ops import autograd, cpu, reference
from quire.ops.cpu import library
from quire.ops.weights import LoraTable, LoraWeight
from tests.ops.shapes import threads

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [(64, 96), (33, 72), (1, 5), (897, 130), (15, 1)]
RANKS = (1, 64, None, 3, 16, 7, 33, 2)
ROWS = 77


# AMX has no kernels of its own here.
@pytest.fixture(params=[name for name in library.isas() if "amx" not in name])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best = library.isa()
    library.set_isa(request.param)
    yield request.param
    library.set_isa(best)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten, in its result or in its own memory, is NaN."""
    nan = torch.full((200, 2000), torch.nan)
    table = table_of(2000, 2000, (64,))
    slots = torch.zeros(200, dtype=torch.int32)
    for count in (2, 1):
        with threads(count):
            cpu.lora(nan, nan.clone(), slots, table)
            cpu.lora_backward(nan, nan, slots, table, True, [True, True])
    monkeypatch.setattr(torch, "empty", lambda shape, dtype: torch.full(shape, torch.nan, dtype=dtype))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def table_of(inputs: int, outputs: int, ranks: tuple[int | None, ...] = RANKS, module=cpu) -> LoraTable:
    return module.lora_table(
        [
            None if rank is None else LoraWeight(random(rank, inputs, seed=n), random(rank, outputs, seed=n + 99), 0.5 + n / 4)
            for n, rank in enumerate(ranks)
        ]
    )


def some_slots(rows: int = ROWS, seed: int = 0) -> Tensor:
    """Mixed, in runs and alone, some of none, one beyond the table."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randint(-1, len(RANKS) + 1, (rows,), generator=generator)
    slots[slots == 3] = -1  # one slot without rows
    slots[20:60] = 1
    return slots.to(torch.int32)


def exact(x: Tensor, y: Tensor, slots: Tensor, table: LoraTable) -> tuple[Tensor, Tensor]:
    """In float64: the result, and the sum of the magnitudes that go into it."""
    out, size = y.double(), y.double().abs()
    for row, slot in enumerate(slots.tolist()):
        weight = table.weights[slot] if 0 <= slot < len(table.weights) else None
        if weight is not None:
            a, b = weight.a.detach().double(), weight.b.detach().double()
            out[row] += weight.scale * (a @ x[row].double()) @ b
            size[row] += abs(weight.scale) * (a.abs() @ x[row].double().abs()) @ b.abs()
    return out, size


def assert_near(got: Tensor, expected: Tensor, size: Tensor, terms: int) -> None:
    rounding = {torch.float32: 0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[got.dtype] * expected.abs()
    tiny = 1e-7 if got.dtype == torch.float16 else 0.0
    assert ((got.double() - expected).abs() <= size * 2.0**-24 * (terms**0.5 * 4 + 8) + rounding + tiny).all()


@pytest.mark.parametrize("inputs,outputs", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poison")
def test_products(isa: str, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    table, slots = table_of(inputs, outputs), some_slots()
    x, y = random(ROWS, inputs).to(dtype), random(ROWS, outputs, seed=1).to(dtype)
    got = cpu.lora(x, y.clone(), slots, table)
    assert_near(got, *exact(x, y, slots, table), inputs + 64)
    untouched = (slots < 0) | (slots == 2) | (slots >= len(RANKS))
    assert untouched.any()
    assert torch.equal(got[untouched], y[untouched])
    for count in (1, 2):
        with threads(count):
            for size in (1, 2, 3, 5, 13, 40, ROWS):
                parts = [
                    cpu.lora(*part, table) for part in zip(x.split(size), y.clone().split(size), slots.split(size), strict=True)
                ]
                assert torch.equal(torch.cat(parts), got), f"{size} rows at a time, {count} threads"
            order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(count))
            assert torch.equal(cpu.lora(x[order], y[order], slots[order], table), got[order])


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_tables_in_one_call(isa: str, dtype: torch.dtype) -> None:
    tables = [table_of(70, outputs, ranks) for outputs, ranks in ((50, RANKS), (9, (None, 4)), (130, (None,)), (64, (2, 5, 8)))]
    x, slots = random(ROWS, 70).to(dtype), some_slots()
    ys = [random(ROWS, table.outputs if table.struct.inputs > 1 else 130, seed=n).to(dtype) for n, table in enumerate(tables)]
    expected = [cpu.lora(x, y.clone(), slots, table) for y, table in zip(ys, tables, strict=True)]
    for count in (1, 2):
        with threads(count):
            got = cpu.loras(x, [y.clone() for y in ys], slots, tables)
            assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("inputs,outputs", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poison")
def test_gradients(isa: str, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    table, slots = table_of(inputs, outputs), some_slots()
    x, dy = random(ROWS, inputs).to(dtype), random(ROWS, outputs, seed=1).to(dtype)
    need = [True] * len(table.tensors)
    dx, gradients = cpu.lora_backward(dy, x, slots, table, True, need)
    back = [None if w is None else LoraWeight(w.b, w.a, w.scale) for w in table.weights]
    zero = torch.zeros_like(x)
    assert_near(dx, *exact(dy, zero, slots, LoraTable(tuple(back))), outputs + 64)
    place = iter(gradients)
    for slot, weight in enumerate(table.weights):
        if weight is None:
            continue
        rows = slots == slot
        xs, g = x[rows].double(), dy[rows].double() * weight.scale
        inner, low = g @ weight.b.double().t(), xs @ weight.a.double().t()
        for got, left, right, width in ((next(place), inner, xs, outputs), (next(place), low, g, inputs)):
            # Of the inner sums the rounding is known by their terms, not by what is left of them.
            terms = (g.abs() @ weight.b.double().abs().t()) if left is inner else xs.abs() @ weight.a.double().abs().t()
            assert_near(got, left.t() @ right, terms.t() @ right.abs(), width + ROWS)
            assert rows.any() or not got.any()
    for count in (1, 2):
        with threads(count):
            again, others = cpu.lora_backward(dy, x, slots, table, True, need)
            assert torch.equal(again, dx)
            assert all(torch.equal(one, other) for one, other in zip(others, gradients, strict=True))
            some = zip(dy.split(5), x.split(5), slots.split(5), strict=True)
            parts = [cpu.lora_backward(*part, table, True, need)[0] for part in some]
            assert torch.equal(torch.cat(parts), dx)


def test_a_slots_gradient_does_not_depend_on_the_others(isa: str) -> None:
    table, slots = table_of(70, 50), some_slots()
    x, dy = random(ROWS, 70), random(ROWS, 50, seed=1)
    need = [True] * len(table.tensors)
    together = cpu.lora_backward(dy, x, slots, table, False, need)[1]
    place = iter(together)
    for slot, weight in enumerate(table.weights):
        if weight is None:
            continue
        mine = slots == slot
        _, alone = cpu.lora_backward(dy[mine], x[mine], slots[mine], table, False, need)
        index = sum(2 for w in table.weights[:slot] if w is not None)
        assert torch.equal(next(place), alone[index])
        assert torch.equal(next(place), alone[index + 1])


def test_only_the_gradients_that_are_wanted() -> None:
    table, slots = table_of(20, 30, (2, None, 3)), torch.tensor([0, 2, 2, -1], dtype=torch.int32)
    x, dy = random(4, 20), random(4, 30, seed=1)
    every = cpu.lora_backward(dy, x, slots, table, True, [True] * 4)
    for wanted in ([True, False, False, True], [False] * 4, [False, True, False, False]):
        dx, gradients = cpu.lora_backward(dy, x, slots, table, not any(wanted), wanted)
        assert (dx is None) == any(wanted)
        assert dx is None or torch.equal(dx, every[0])
        for got, expected, need in zip(gradients, every[1], wanted, strict=True):
            assert got is None if not need else torch.equal(got, expected)


def test_autograd_gives_the_gradients_of_the_reference() -> None:
    slots = some_slots()
    x, y, dy = random(ROWS, 40), random(ROWS, 28, seed=1), random(ROWS, 28, seed=2)
    found = []
    for module in (cpu, reference):
        table = table_of(40, 28, module=module)
        leaves = [x.clone().requires_grad_(), y.clone().requires_grad_(), *(t.requires_grad_() for t in table.tensors)]
        out = autograd.lora(module.lora, module.lora_backward, *leaves[:2], slots, table)
        found.append((out, torch.autograd.grad(out, leaves, dy)))
        assert torch.equal(leaves[1], y)  # a y that is needed elsewhere is not overwritten
    (out, gradients), (expected, others) = found
    assert torch.allclose(out, expected, atol=1e-4)
    for got, other in zip(gradients, others, strict=True):
        assert torch.allclose(got, other, atol=1e-3, rtol=1e-4)


def test_matrices_that_change_in_place_are_seen() -> None:
    table = ops.lora_table([LoraWeight(random(2, 8), random(2, 6, seed=1), 1.0)])
    x, slots = random(3, 8, seed=2), torch.zeros(3, dtype=torch.int32)
    before = ops.lora(x, torch.zeros(3, 6), slots, table)
    table.weights[0].a.mul_(2)
    assert torch.allclose(ops.lora(x, torch.zeros(3, 6), slots, table), 2 * before)


def test_no_rows_and_no_adapters() -> None:
    slots = torch.zeros(0, dtype=torch.int32)
    assert cpu.lora(torch.zeros(0, 8), torch.zeros(0, 6), slots, table_of(8, 6)).shape == (0, 6)
    dx, gradients = cpu.lora_backward(torch.zeros(0, 6), torch.zeros(0, 8), slots, table_of(8, 6), True, [True] * 14)
    assert dx.shape == (0, 8)
    assert not any(gradient.any() for gradient in gradients)
    y = random(3, 6)
    assert torch.equal(cpu.lora(random(3, 8), y.clone(), torch.zeros(3, dtype=torch.int32), cpu.lora_table([None, None])), y)


def test_rows_may_lie_apart_and_nothing_beside_them_is_written(isa: str) -> None:
    table, slots = table_of(24, 33), some_slots(20)
    wide, room = random(20, 60), torch.full((20, 50), torch.nan)
    y = random(20, 33, seed=1)
    room[:, 5:38] = y
    got = cpu.lora(wide[:, 7:31], room[:, 5:38], slots, table)
    assert torch.equal(got, cpu.lora(wide[:, 7:31].contiguous(), y.clone(), slots, table))
    spread = slots.repeat_interleave(3)[::3]
    assert torch.equal(cpu.lora(wide[:, 7:31], y.clone(), spread, table), got)
    assert torch.equal(cpu.loras(wide[:, 7:31], [y.clone()], spread, [table])[0], got)
    need = [True] * len(table.tensors)
    gradients = [cpu.lora_backward(y, wide[:, 7:31], one, table, True, need) for one in (slots, spread)]
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert all(torch.equal(*pair) for pair in zip(gradients[0][1], gradients[1][1], strict=True))
    assert room[:, :5].isnan().all()
    assert room[:, 38:].isnan().all()


def test_fused_instruction_sets_agree_to_the_bit() -> None:
    best, results = library.isa(), []
    table, slots = table_of(130, 77), some_slots()
    x, y = random(ROWS, 130), random(ROWS, 77, seed=1)
    for name in library.isas():
        if name != "generic":
            library.set_isa(name)
            dx, gradients = cpu.lora_backward(y, x, slots, table, True, [True] * len(table.tensors))
            results.append([cpu.lora(x, y.clone(), slots, table), dx, *gradients])
    library.set_isa(best)
    for one in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, results[0], strict=True))
