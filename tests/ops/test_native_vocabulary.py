"""Log-probabilities, cross-entropy and the draw: native on every instruction set that this machine can run and the reference,
bit for bit the same; against float64; row by row. Outputs are poisoned with NaN before each call.
"""

from __future__ import annotations

import random as python_random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from quire import ops
from quire.ops import cpu, reference
from quire.ops.cpu import library, vocabulary
from tests.ops.shapes import threads

VOCABULARIES = (1, 2, 7, 8, 127, 128, 129, 1000, 4099)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=library.isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best = library.isa()
    library.set_isa(request.param)
    yield request.param
    library.set_isa(best)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten is NaN, or an odd number."""

    real = torch.empty

    def empty(*shape: Any, dtype: torch.dtype = torch.float32, **others: Any) -> Tensor:
        return real(*shape, dtype=dtype, **others).fill_(torch.nan if dtype.is_floating_point else 77)

    monkeypatch.setattr(vocabulary.torch, "empty", empty)
    monkeypatch.setattr(ops, "selected", lambda: cpu)


def some_logits(rows: int, size: int, seed: int = 0) -> Tensor:
    """Flat, ordinary, peaked and tied rows, some tokens forbidden, zeros of both signs, and numbers far from zero."""
    logits = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))
    logits *= torch.tensor([0.01, 0.5, 2.0, 8.0]).repeat(rows)[:rows].unsqueeze(1)
    logits[1::5] = (logits[1::5] * 2).round() / 2
    logits[2::5, ::3] = -torch.inf
    logits[2::5, 0] = -0.0
    logits[3::7] += 1e4
    logits[4::9] = 1.5
    return logits


def some_rules(rows: int, seed: int = 0) -> list[Tensor]:
    source = python_random.Random(seed)

    def column(*choices: float) -> list[float]:
        return [source.choice(choices) for _ in range(rows)]

    return [
        torch.tensor(column(0.0, 0.01, 0.3, 1.0, 1.0, 2.0), dtype=torch.float64),
        torch.tensor(column(0.0, 0.0, 0.02, 0.5, 1.0), dtype=torch.float64),
        torch.tensor(column(0, 0, 1, 2, 5, 50, 129, 400, 3000, 10**6), dtype=torch.int64),
        torch.tensor(column(1.0, 1.0, 0.95, 0.5, 0.999, 1e-9, 1 - 2**-53), dtype=torch.float64),
        torch.tensor(column(0.0, 1 - 2**-53, *(source.random() for _ in range(6))), dtype=torch.float64),
    ]


def assert_every_order(compute: Callable[[Tensor], Tensor], expected: Tensor) -> None:
    """compute(numbers of rows): any rows, in any order, by any number of threads."""
    rows = len(expected)
    for count in (1, 2):
        with threads(count):
            for part in (torch.arange(rows), torch.arange(rows).flip(0), torch.arange(5, 6), torch.arange(0, rows, 3)):
                assert torch.equal(compute(part), expected[part])


@pytest.mark.parametrize("size", VOCABULARIES)
def test_draws_are_the_reference_token_for_token(size: int) -> None:
    rows = 300 if size < 2000 else 90
    for seed in range(3):
        logits, rules = some_logits(rows, size, seed), some_rules(rows, seed)
        with threads(1):
            tokens = cpu.draw(logits, *rules)
        assert torch.equal(tokens, reference.draw(logits, *rules))
        assert_every_order(lambda part: cpu.draw(logits[part], *(x[part] for x in rules)), tokens)  # noqa: B023


def test_draws_over_a_whole_vocabulary() -> None:
    logits, rules = some_logits(24, 151_937), some_rules(24, 5)
    rules[0].clamp_(min=0.3)
    view = torch.full((24, 152_000), torch.nan)[:, 3 : 3 + 151_937].copy_(logits)
    tokens = cpu.draw(view, *rules)
    assert torch.equal(tokens, reference.draw(logits, *rules))
    assert_every_order(lambda part: cpu.draw(logits[part], *(x[part] for x in rules)), tokens)


def test_top_k_keeps_exactly_k_and_the_lowest_ids_of_equals() -> None:
    logits = torch.zeros(1, 700)
    logits[0, 600] = 1.0
    for k in (1, 2, 3, 130, 699, 700):
        last = cpu.draw(logits, *rules(top_k=k, uniform=1 - 2**-53))
        assert last.item() == (600 if k == 1 else k - 2 if k <= 601 else k - 1)


def rules(top_k: int = 0, top_p: float = 1.0, uniform: float = 0.0) -> list[Tensor]:
    """Of one row, at temperature 1."""
    numbers = (1.0, 0.0, top_k, top_p, uniform)
    return [torch.tensor([x], dtype=torch.int64 if isinstance(x, int) else torch.float64) for x in numbers]


def test_top_p_is_the_smallest_set_that_reaches_it() -> None:
    logits = torch.tensor([[0.125, 0.5, 0.125, 0.25]]).log()
    for top_p, last in ((0.5, 1), (0.49, 1), (0.51, 3), (0.75, 3), (0.751, 0), (0.9, 2)):
        assert cpu.draw(logits, *rules(top_p=top_p, uniform=1 - 2**-53)).item() == last


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_corrupted_rows_are_named_and_hurt_no_other(bad: float) -> None:
    for size in (1, 7, 300, 4099):
        logits, given = some_logits(40, size, 3), some_rules(40, 3)
        tokens = cpu.draw(logits, *given)
        for place in (0, size // 2, size - 1):
            hurt = logits.clone()
            hurt[11] = -torch.inf if bad == -torch.inf else 0.5
            hurt[11, place] = bad
            found = cpu.draw(hurt, *given)
            assert found[11] == -1
            assert torch.equal(found[:11], tokens[:11])
            assert torch.equal(found[12:], tokens[12:])
            peaks = cpu.peaks(hurt)[0]
            assert not peaks[11].isfinite()
            assert torch.equal(peaks.isnan(), torch.arange(40).eq(11) & (torch.tensor(bad).isnan()))
            assert ops.log_softmax_at(hurt, torch.zeros(40, 1, dtype=torch.int64))[11].isnan()
            slope = torch.empty(40, size, dtype=torch.float32)
            assert ops.cross_entropy(hurt, torch.zeros(40, dtype=torch.int64), slope)[0].isnan().nonzero().tolist() == [[11]]
            assert slope[11].isnan().all()
            assert not slope[:11].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [*VOCABULARIES, 50_257])
def test_log_probabilities_and_slopes(size: int, dtype: torch.dtype) -> None:
    rows = 60 if size < 50_000 else 7
    logits = some_logits(rows, size).to(dtype)
    targets = torch.randint(0, size, (rows,), generator=torch.Generator().manual_seed(1))
    slope = torch.empty(rows, size, dtype=dtype)
    found, right = ops.cross_entropy(logits, targets, slope)
    exact = torch.log_softmax(logits.double(), -1)
    reachable = exact.gather(1, targets[:, None])[:, 0]
    error = (found.double() - reachable)[reachable.isfinite()].abs()
    assert (error <= 5e-7 + 2e-7 * reachable[reachable.isfinite()].abs()).all(), error.max()
    assert torch.equal(found.isinf(), reachable.isinf())
    assert torch.equal(right, logits.gather(1, targets[:, None])[:, 0] == logits.amax(-1))
    wanted = exact.exp()
    wanted[torch.arange(rows), targets] -= 1
    assert ((slope.double() - wanted).abs() <= wanted.abs() * torch.finfo(dtype).eps + 5e-7).all()
    # Forward only, one by one, and for serving: the same bits.
    assert torch.equal(ops.cross_entropy(logits, targets)[0], found)
    assert torch.equal(ops.log_softmax_at(logits, targets[:, None])[:, 0], found)
    assert_every_order(lambda part: ops.cross_entropy(logits[part], targets[part])[0], found)
    # In place, and as the reference has it.
    theirs = torch.empty(rows, size, dtype=dtype)
    sums = cpu.cross_entropy(logits, targets, slope), reference.cross_entropy(logits, targets, theirs)
    assert all(torch.equal(mine, its) for mine, its in zip(*sums, strict=True))
    assert torch.equal(slope, theirs)
    own = logits.clone()
    assert torch.equal(ops.cross_entropy(own, targets, own)[0], found)
    assert torch.equal(own, slope)


@pytest.mark.parametrize("dtype", DTYPES)
def test_peaks(dtype: torch.dtype) -> None:
    for size in VOCABULARIES:
        logits = some_logits(60, size).to(dtype)
        values, ids = logits.float().sort(dim=-1, descending=True, stable=True)
        found, places = cpu.peaks(logits)
        assert torch.equal(found, values[:, 0])
        assert torch.equal(places, ids[:, 0])
        assert all(torch.equal(a, b) for a, b in zip(reference.peaks(logits), (found, places), strict=True))


def test_no_rows() -> None:
    none = torch.zeros(0, 5)
    assert cpu.draw(none, *(x[:0] for x in rules())).shape == (0,)
    assert ops.cross_entropy(none, torch.zeros(0, dtype=torch.int64), none)[0].shape == (0,)


def test_a_target_outside_the_vocabulary_is_refused() -> None:
    logits = torch.zeros(2, 5)
    for target in (-1, 5):
        with pytest.raises(AssertionError):
            cpu.cross_entropy(logits, torch.tensor([0, target]), logits)
