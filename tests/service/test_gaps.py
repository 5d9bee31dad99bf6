"""Training's share of the engine's time, under a virtual clock."""

from __future__ import annotations

from quire.service.gaps import REMEMBERED_SECONDS, TRIAL_SECONDS, Gaps


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
