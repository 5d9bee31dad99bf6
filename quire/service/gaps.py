"""Serve first, train in the gaps: how much work may be done between two steps of the engine.

While nothing runs, one piece after the other, looking for requests in between. While requests run, pieces are done only as far
as they are expected to fit into a budget for each step. What a piece takes is known from the last ones, and by how much such
expectations were wrong lately is kept free: the bound is kept by not beginning what would break it. Knows no training and no
engine; the clock is injected.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

REMEMBERED = 128
"""Pieces that are remembered: more than a step has, for its rarest piece may be its longest."""
REMEMBERED_SECONDS = 30.0
TRIAL_SECONDS = 10.0
"""After so long without a piece one is tried, so that one slow moment of the machine does not stop training for good. One
step in ten seconds is beyond what a 99th percentile sees."""


SURPRISE_SECONDS = 600.0
"""A piece that took longer than expected says how far expectations are to be trusted, for so long."""
MOST_MARGIN = 0.5
"""Beyond that it was no noise but something rare, which no margin foresees."""


class Gaps:
    """budget: seconds that may be added to a step in which requests run; 0: nothing is done then."""

    def __init__(self, budget: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.budget = budget
        self.pieces = self.pieces_between_steps = 0
        self.longest_between_steps = self.typical = 0.0
        """For others to read: the most that was added to a step, and what a piece was expected to take lately."""
        self._clock = clock
        self._taken: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)
        self._surprises: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)
        self._last = clock()

    @property
    def expected(self) -> float:
        """Seconds that the next piece stays below, as far as is known; unknown is as long as the whole budget."""
        while len(self._taken) > 1 and self._taken[0][0] < self._clock() - REMEMBERED_SECONDS:
            self._taken.popleft()
        return max((seconds for _, seconds in self._taken), default=self.budget)

    @property
    def margin(self) -> float:
        """The share by which a piece may take longer than expected, learned from those that did."""
        while self._surprises and self._surprises[0][0] < self._clock() - SURPRISE_SECONDS:
            self._surprises.popleft()
        return max((share for _, share in self._surprises), default=0.0)

    @property
    def starved(self) -> bool:
        """Whether one piece alone is expected to take more than the budget, so that training waits for idle moments."""
        return self.expected > self.budget

    @property
    def waited(self) -> float:
        """Seconds since the last piece."""
        return self._clock() - self._last

    def work(self, piece: Callable[[], bool], busy: bool) -> bool:
        """Do what may be done now; `piece` does one piece and says whether there is more. Returns what the last one said."""
        if not busy:
            return self._do(piece)
        left, more = self.budget, True
        if self.budget <= 0:
            return True
        if self.starved and self.waited < TRIAL_SECONDS:
            return True
        began, first = self._clock(), True
        # The first piece needs no margin: a piece that just fits would else never be done beside requests.
        while more and (first or self.expected * (1 + self.margin) <= left):
            more = self._do(piece)
            first = False
            self.pieces_between_steps += 1
            left = self.budget - (self._clock() - began)
        self.longest_between_steps = max(self.longest_between_steps, self._clock() - began)
        return more

    def _do(self, piece: Callable[[], bool]) -> bool:
        began, expected = self._clock(), self.expected
        more = piece()
        self._last = self._clock()
        taken = self._last - began
        # The first pieces are expected by nothing: that a longer kind comes after them is no noise.
        if self.pieces >= REMEMBERED and expected < taken <= expected * (1 + MOST_MARGIN):
            self._surprises.append((self._last, taken / expected - 1))
        self._taken.append((self._last, taken))
        self.typical = self.expected
        self.pieces += 1
        return more
