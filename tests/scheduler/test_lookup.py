"""Drafts of one sequence: the longest latest match, by brute force; how many tokens, by what came true before."""

from __future__ import annotations

import random

import pytest

from quire.scheduler import lookup
from quire.scheduler.lookup import Lookup
from quire.speculation import Speculation


def by_hand(tokens: list[int], shortest: int, longest: int, length: int) -> tuple[int, ...]:
    """What `Lookup` is to propose, found by trying everything."""
    for size in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        for place in range(len(tokens) - 1, size - 1, -1):
            if tokens[place - size : place] == tokens[-size:]:
                draft = list(tokens[place:])
                while len(draft) < length:
                    draft.append(draft[len(draft) - (len(tokens) - place)])
                return tuple(draft[:length])
    return ()


@pytest.mark.parametrize("seed", range(40))
def test_the_longest_match_wins_and_of_equals_the_latest(seed: int) -> None:
    rng = random.Random(seed)
    shortest = rng.randint(1, 3)
    longest = rng.randint(shortest, 6)
    length = rng.randint(1, 5)
    words, tokens = rng.randint(4, 9), []
    found = Lookup(Speculation(length, shortest, longest))
    found.estimate = 1.0
    for _ in range(rng.randint(1, 90)):
        # Few enough that no n-gram occurs more often than is looked at.
        tokens += [rng.randrange(words) for _ in range(rng.randint(1, 4))]
        if max(tokens.count(word) for word in range(words)) >= lookup.CANDIDATES:
            break
        assert found.propose(tokens, length, 0.0) == by_hand(tokens, shortest, longest, length)


def test_a_match_that_reaches_to_the_end_repeats_itself() -> None:
    assert Lookup(Speculation(3, 1, 4)).propose([9, 7, 7, 7], 3, 0.3) == (7, 7, 7)
    assert Lookup(Speculation(3, 2, 4)).propose([1, 2, 3, 1, 2, 3, 1, 2], 3, 0.3) == (3, 1, 2)


def test_nothing_is_proposed_where_nothing_matches() -> None:
    assert Lookup(Speculation(4, 2, 5)).propose([1], 4, 0.3) == ()
    assert Lookup(Speculation(4, 2, 5)).propose([1, 2, 3, 2, 1], 4, 0.3) == ()
    assert Lookup(Speculation(4, 2, 5)).propose([1, 2, 3, 1, 2], 0, 0.3) == ()


def test_drafts_grow_with_what_comes_true_and_cease_with_what_does_not() -> None:
    drafts = Lookup(Speculation(6, 1, 1))
    tokens = [1, 2] * 10

    def drafted(accepted: int) -> int:
        length = len(drafts.propose(tokens, 6, 0.3))
        if length:
            drafts.learn(length, min(length, accepted))
        return length

    grown = [drafted(6) for _ in range(8)]
    assert grown == sorted(grown)
    assert (grown[0], grown[-1]) == (3, 6)
    shrunk = [drafted(0) for _ in range(12)]
    assert shrunk == sorted(shrunk, reverse=True)
    assert shrunk[-1] == 0
    # From then on a single token now and then, less and less often, until they come true again.
    tried = [drafted(0) for _ in range(7 * lookup.FIRST_PROBE)]
    assert (sum(tried), max(tried)) == (3, 1)
    back = [drafted(6) for _ in range(9 * lookup.FIRST_PROBE)]
    assert back[-1] == 6
    # One wrong token among many right ones changes little.
    drafts.learn(6, 5)
    assert len(drafts.propose(tokens, 6, 0.3)) >= 3
    # Where a row costs more, less is drafted.
    assert len(drafts.propose(tokens, 6, 0.3)) > len(drafts.propose(tokens, 6, 0.6)) > 0


def test_a_long_prompt_is_indexed_over_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "CATCH_UP", 100)
    drafts, tokens = Lookup(Speculation(2, 2, 5)), list(range(150)) * 2
    assert [drafts.propose(tokens, 2, 0.3) for _ in range(4)] == [(), (), (0, 1), (0, 1)]


def test_a_proposal_costs_the_same_after_a_hundred_thousand_tokens() -> None:
    """Counted in tokens that are looked at, not timed."""

    class Counting(list):
        looked_at = 0

        def __getitem__(self, key):
            found = super().__getitem__(key)
            Counting.looked_at += len(found) if isinstance(key, slice) else 1
            return found

    rng = random.Random(0)
    tokens = Counting(rng.randrange(50) for _ in range(100_000))
    drafts = Lookup(Speculation(4, 2, 5))
    while not drafts._catch_up(tokens):
        pass
    for _ in range(10):
        Counting.looked_at = 0
        tokens.append(rng.randrange(50))
        drafts.propose(tokens, 4, 0.3)
        assert Counting.looked_at <= 2 * lookup.CANDIDATES * 5 + 20
