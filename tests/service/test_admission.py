"""Slots are taken on arrival and all given back; refusals say how long to wait."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import InvalidRequest, Overloaded, TooManyRequests
from quire.service.admission import Admission, Ticket
from quire.service.limits import Limits


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def admission(clock: Clock | None = None, **limits: int | None) -> Admission:
    return Admission(Limits(**limits), clock=clock or Clock())


def test_the_limit_counts_samples_waiting_and_running() -> None:
    house = admission(max_num_queued_reqs=3)
    first = house.arrive()
    first.extend(samples=2, tokens=5)
    house.arrive()
    with pytest.raises(Overloaded, match="3 of 3"):
        house.arrive()
    first.release()
    house.arrive()
    house.arrive()


def test_a_request_that_grows_beyond_the_limit_is_refused_and_keeps_only_its_slot() -> None:
    house = admission(max_num_queued_reqs=3)
    first, second = house.arrive(), house.arrive()
    with pytest.raises(Overloaded):
        first.extend(samples=3, tokens=0)
    with pytest.raises(InvalidRequest, match="at most 3 on this server, got 4"):
        first.extend(samples=4, tokens=0)
    first.release()
    second.release()
    assert house.samples == 0


def test_release_is_idempotent() -> None:
    house = admission()
    ticket = house.arrive("k")
    ticket.extend(samples=4, tokens=100)
    ticket.computed(30)
    ticket.release()
    ticket.release()
    assert (house.samples, house.backlog_tokens) == (0, 0)


def test_token_backlog_lets_one_large_request_in() -> None:
    house = admission(max_num_queued_tokens=10)
    large, small = house.arrive(), house.arrive()
    large.extend(samples=1, tokens=1000)
    with pytest.raises(Overloaded, match="1000 prompt tokens of at most 10"):
        small.extend(samples=1, tokens=1)
    large.computed(1000)
    small.extend(samples=1, tokens=1)


def test_each_key_has_its_share() -> None:
    refused: list[str] = []
    house = Admission(Limits(max_requests_per_key=1), refused.append, Clock())
    mine = house.arrive("a")
    house.arrive("b")
    with pytest.raises(TooManyRequests):
        house.arrive("a")
    assert refused == ["key_concurrency"]
    mine.release()
    house.arrive("a")


def test_the_wait_follows_the_rate_and_is_clamped() -> None:
    clock = Clock()
    house = admission(clock, max_num_queued_reqs=1)

    def wait() -> float:
        ticket = house.arrive()
        with pytest.raises(Overloaded) as refused:
            house.arrive()
        ticket.release()
        return refused.value.retry_after

    assert 1 <= wait() <= 60
    for _ in range(200):
        ticket = house.arrive()
        clock.now += 0.01
        ticket.release()
    assert 1 <= wait() <= 2, "a hundred a second: come back at once"
    clock.now += 3000
    assert 1 <= wait() <= 2, "an idle hour changes nothing"
    ticket = house.arrive()
    clock.now += 300
    with pytest.raises(Overloaded) as refused:
        house.arrive()
    assert refused.value.retry_after > 30, "nothing has moved for minutes"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(1, 4), st.integers(0, 50)), max_size=60))
def test_counters_return_to_zero_whatever_happens(actions: list[tuple[int, int, int, int]]) -> None:
    house = admission(max_num_queued_reqs=6, max_num_queued_tokens=60, max_requests_per_key=3)
    tickets: list[Ticket] = []
    for kind, which, samples, tokens in actions:
        try:
            if kind == 0 or not tickets:
                tickets.append(house.arrive(str(which % 3)))
            elif kind == 1:
                tickets[which % len(tickets)].extend(samples=samples, tokens=tokens)
            elif kind == 2:
                tickets[which % len(tickets)].computed(tokens)
            else:
                tickets.pop(which % len(tickets)).release()
        except (Overloaded, TooManyRequests):
            pass
        assert 0 <= house.samples <= 6
        assert house.backlog_tokens >= 0
    for ticket in tickets:
        ticket.release()
    assert (house.samples, house.backlog_tokens) == (0, 0)
