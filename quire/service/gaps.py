"""Serve first, train in the gaps: how much work may be done between two steps of the engine.

While nothing runs, one piece after the other, looking for requests in between. While requests run, pieces are done only as far
as they are expected to fit into a budget for each step. What a piece takes is known from the last ones: the bound is kept by
not beginning what would break it. Knows no training and no engine; the clock is injected.
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


class Gaps:
    """budget: seconds that may be added to a step in which requests run; 0: nothing is done then."""

    def __init__(self, budget: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.budget = budget
        self.pieces = self.pieces_between_steps = 0
        self.longest_between_steps = self.typical = 0.0
        """For others to read: the most that was added to a step, and what a piece was expected to take lately."""
        self._clock = clock
        self._taken: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)
        self._last = clock()

    @property
    def expected(self) -> float:
        """Seconds that the next piece stays below, as far as is known; unknown is as long as the whole budget."""
        while len(self._taken) > 1 and self._taken[0][0] < self._clock() - REMEMBERED_SECONDS:
            self._taken.popleft()
        return max((seconds for _, seconds in self._taken), default=self.budget)

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
        while more and (first or self.expected <= left):
            more = self._do(piece)
            first = False
            self.pieces_between_steps += 1
            left = self.budget - (self._clock() - began)
        self.longest_between_steps = max(self.longest_between_steps, self._clock() - began)
        return more

    def _do(self, piece: Callable[[], bool]) -> bool:
        began = self._clock()
        more = piece()
        self._last = self._clock()
        self._taken.append((self._last, self._last - began))
        self.typical = self.expected
        self.pieces += 1
        return more
