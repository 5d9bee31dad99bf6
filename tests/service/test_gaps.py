"""Training's share of the engine's time, under a virtual clock."""

from __future__ import annotations

import random

import pytest

from quire.service import gaps as gaps_module
from quire.service.gaps import MOST_MARGIN, REMEMBERED, REMEMBERED_SECONDS, SURPRISE_SECONDS, TRIAL_SECONDS, Gaps


class World:
    """A clock, and work of which every piece takes so long."""

    def __init__(self, seconds: float, pieces: int = 1_000_000) -> None:
        self.now, self.seconds, self.left, self.done = 0.0, seconds, pieces, 0

    def clock(self) -> float:
        return self.now

    def piece(self) -> bool:
        self.now += self.seconds
        self.left -= 1
        self.done += 1
        return self.left > 0


def test_idle_time_is_used_piece_by_piece() -> None:
    world = World(3.0, pieces=2)
    gaps = Gaps(0.05, world.clock)
    assert gaps.work(world.piece, busy=False), "one piece, then a look for requests"
    assert world.done == 1
    assert not gaps.work(world.piece, busy=False), "the last one has nothing after it"


def test_the_budget_bounds_what_is_added_to_a_step() -> None:
    world = World(0.02)
    gaps = Gaps(0.05, world.clock)
    for _ in range(100):
        begin = world.now
        assert gaps.work(world.piece, busy=True)
        assert world.now - begin <= 0.05
        world.now += 0.01  # the step itself
    assert world.done == 200, "as many as fit"


def test_pieces_that_do_not_fit_wait_for_idle_time() -> None:
    world = World(0.2)
    gaps = Gaps(0.05, world.clock)
    gaps.work(world.piece, busy=False)
    assert gaps.starved
    for _ in range(200):
        assert gaps.work(world.piece, busy=True), "there is more to do, only not now"
        world.now += 0.02
    assert world.done == 1
    world.now += TRIAL_SECONDS
    gaps.work(world.piece, busy=True)
    gaps.work(world.piece, busy=True)
    assert world.done == 2, "one trial after a long while"
    gaps.work(world.piece, busy=False)
    assert world.done == 3


def test_one_slow_moment_is_forgotten() -> None:
    world = World(0.5)
    gaps = Gaps(0.05, world.clock)
    gaps.work(world.piece, busy=False)
    world.seconds = 0.01
    for _ in range(20):
        gaps.work(world.piece, busy=False)
    assert gaps.starved, "what may come again is not forgotten at once"
    world.now += REMEMBERED_SECONDS
    gaps.work(world.piece, busy=False)
    assert not gaps.starved
    begin = world.now
    gaps.work(world.piece, busy=True)
    assert 0 < world.now - begin <= 0.05


def test_a_budget_of_zero_trains_only_when_idle() -> None:
    world = World(0.001)
    gaps = Gaps(0.0, world.clock)
    for _ in range(50):
        assert gaps.work(world.piece, busy=True)
        world.now += 1
    assert world.done == 0
    assert gaps.work(world.piece, busy=False)


def learned(world: World) -> Gaps:
    """Gaps that know the world's pieces."""
    gaps = Gaps(0.05, world.clock)
    for _ in range(REMEMBERED):
        gaps.work(world.piece, busy=False)
    return gaps


def test_a_piece_that_took_longer_leaves_a_margin_for_a_while() -> None:
    world = World(0.01)
    gaps = learned(world)
    assert gaps.margin == 0
    world.seconds = 0.012
    gaps.work(world.piece, busy=False)
    assert abs(gaps.margin - 0.2) < 1e-9
    world.seconds = 0.01
    done = world.done
    gaps.work(world.piece, busy=True)
    assert world.done == done + 4, "the fifth could take 0.0144"
    world.now += SURPRISE_SECONDS + 1
    assert gaps.margin == 0


def test_a_rare_long_moment_is_no_margin_and_the_first_pieces_are_none() -> None:
    world = World(0.01)
    gaps = learned(world)
    world.seconds = 0.01 * (2 + MOST_MARGIN)
    gaps.work(world.piece, busy=False)
    assert gaps.margin == 0
    young = Gaps(0.05, world.clock)
    for seconds in (0.01, 0.011, 0.013):
        world.seconds = seconds
        young.work(world.piece, busy=False)
    assert young.margin == 0


def test_a_piece_that_just_fits_is_done_in_spite_of_a_margin() -> None:
    world = World(0.04)
    gaps = learned(world)
    world.seconds = 0.045
    gaps.work(world.piece, busy=False)
    done = world.done
    for _ in range(10):
        gaps.work(world.piece, busy=True)
    assert world.done == done + 10


def steps_over_budget(monkeypatch: pytest.MonkeyPatch, most_margin: float) -> tuple[int, int]:
    """Of 3,000 steps beside pieces whose times wander by three percent, one in fifty a tenth longer; and pieces done."""
    monkeypatch.setattr(gaps_module, "MOST_MARGIN", most_margin)
    source, world = random.Random(5), World(0.0124)
    gaps, over, done = learned(world), 0, world.done

    def piece() -> bool:
        world.seconds = 0.0124 * source.uniform(0.97, 1.0) * (1.1 if source.random() < 0.02 else 1.0)
        return world.piece()

    for _ in range(3000):
        begin = world.now
        gaps.work(piece, busy=True)
        over += world.now - begin > gaps.budget
        world.now += 0.02
    return over, world.done - done


def test_noise_does_not_break_the_budget_once_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    without, most = steps_over_budget(monkeypatch, 0.0)
    over, done = steps_over_budget(monkeypatch, MOST_MARGIN)
    assert over == 0 < without
    assert done > 0.85 * most, "and training keeps most of its time"
