"""What may come next in one sequence: the tokens that followed when its last tokens stood there before.

Two small things for each sequence: an index of where every n-gram last occurred, and an estimate of how often drafts come true,
which decides how long the next one is. Knows tokens only; nothing of blocks, steps or the model.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from quire.speculation import Speculation

# Earlier occurrences of the shortest n-gram that are looked at, latest first.
CANDIDATES = 32
# Tokens that one call may add to the index: a long prompt is indexed over several steps, about a millisecond in each.
CATCH_UP = 4096
# The share of drafted tokens that come true: where the estimate begins, and how much a new token weighs.
FIRST_ESTIMATE, WEIGHT = 0.7, 0.2
# While no draft is worth its row, one token is tried after so many matches; each time in vain doubles their number.
FIRST_PROBE, LAST_PROBE = 16, 256


class Lookup:
    """The drafts of one sequence. Its tokens are given at each call; they only ever grow at the end."""

    __slots__ = ("_last", "_next", "_passed", "_previous", "_probe_after", "_rules", "estimate")

    def __init__(self, rules: Speculation) -> None:
        self.estimate = FIRST_ESTIMATE
        self._rules = rules
        # A place is the index of the token that follows an n-gram. Of each n-gram (by its hash) the last place, and of each
        # place the one before it with the same n-gram: 0, which no n-gram precedes, ends the chain.
        self._last: dict[int, int] = {}
        self._previous = array("q")
        self._next = rules.prompt_lookup_min
        self._passed, self._probe_after = 0, FIRST_PROBE

    def propose(self, tokens: Sequence[int], most: int, least: float) -> tuple[int, ...]:
        """At most `most` tokens that may follow `tokens`, each of which comes true with a chance of at least `least` by the
        estimate; none if nothing matches."""
        if not self._catch_up(tokens):
            return ()
        place = self._find(tokens)
        if place == 0:
            return ()
        length = min(most, self._length(least))
        if length == 0:
            self._passed += 1
            if self._passed < self._probe_after:
                return ()
            self._passed, self._probe_after, length = 0, min(LAST_PROBE, 2 * self._probe_after), 1
        draft = list(tokens[place : place + length])
        # A match that reaches to the end repeats itself: what is missing is copied from the draft's own beginning.
        period = len(tokens) - place
        while len(draft) < length:
            draft.append(draft[len(draft) - period])
        return tuple(draft)

    def learn(self, drafted: int, accepted: int) -> None:
        """Of `drafted` tokens the first `accepted` came true. What stands behind the first wrong one says nothing."""
        if accepted:
            self._probe_after = FIRST_PROBE
        for _ in range(accepted):
            self.estimate += WEIGHT * (1 - self.estimate)
        if accepted < drafted:
            self.estimate -= WEIGHT * self.estimate

    def _length(self, least: float) -> int:
        """How many tokens are worth drafting: the chance of each is that of all before it times its own."""
        length, chance = 0, self.estimate
        while chance >= least and length < self._rules.num_speculative_tokens:
            length += 1
            chance *= self.estimate
        return length

    def _catch_up(self, tokens: Sequence[int]) -> bool:
        """Index the n-grams that a token is known to follow; False if there are more than one call may take."""
        size, last, previous = self._rules.prompt_lookup_min, self._last, self._previous
        end = min(len(tokens), self._next + CATCH_UP)
        for place in range(self._next, end):
            key = hash(tuple(tokens[place - size : place]))
            previous.append(last.get(key, 0))
            last[key] = place
        self._next = max(self._next, end)
        return end == len(tokens)

    def _find(self, tokens: Sequence[int]) -> int:
        """The place after the longest match, the latest of equal ones; 0 if there is none."""
        shortest, longest = self._rules.prompt_lookup_min, self._rules.prompt_lookup_max
        place = self._last.get(hash(tuple(tokens[-shortest:])), 0)
        best, best_length = 0, shortest - 1
        for _ in range(CANDIDATES):
            if place == 0 or best_length == longest:
                break
            length = _common_end(tokens, place, longest)
            if length > best_length:
                best, best_length = place, length
            place = self._previous[place - shortest]
        return best


def _common_end(tokens: Sequence[int], place: int, most: int) -> int:
    """How many tokens before `place` equal the last ones, at most `most`."""
    length = 0
    while length < most and length < place and tokens[place - 1 - length] == tokens[-1 - length]:
        length += 1
    return length
