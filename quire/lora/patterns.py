"""Whether a regular expression that came with an adapter may be tried on module names.

Python's matching cannot be stopped and holds the interpreter while it runs, so a pattern of which a short name could cost
seconds is refused before it is used. What people and tools write for module names is far below the limits.
"""

from __future__ import annotations

import math
import re
from re import _constants as kinds
from re import _parser as parser
from typing import Any

MOST_CHARACTERS = 2000
NAME_LENGTH = 80
MOST_STEPS, MOST_WAYS = 3e8, 1e5
# From so many repetitions on, a repeat counts as one without end.
MANY = 16
PLAIN = {kinds.LITERAL, kinds.NOT_LITERAL, kinds.ANY, kinds.IN, kinds.AT}
REPEATS = {kinds.MAX_REPEAT, kinds.MIN_REPEAT, kinds.POSSESSIVE_REPEAT}


def problem_of(pattern: str) -> str | None:
    """Why `pattern` is not used; None if it is."""
    if len(pattern) > MOST_CHARACTERS:
        return f"of at most {MOST_CHARACTERS} characters; it has {len(pattern)}"
    try:
        re.compile(pattern)
        endless, ways = _cost(parser.parse(pattern), repeated=False)
    except (re.error, OverflowError, RecursionError) as error:
        return f"that Python reads ({error})"
    except _TooMuchError as error:
        return f"without {error}"
    steps = ways * NAME_LENGTH**endless / math.factorial(endless)
    if steps > MOST_STEPS or ways > MOST_WAYS:
        return f"that is matched quickly; this one has {endless} open repeats in a row and {ways:.0f} ways besides"
    return None


class _TooMuchError(Exception):
    """The pattern has something that can take very long."""


def _cost(items: Any, *, repeated: bool) -> tuple[int, float]:
    """(repeats without end along the worst way, ways to choose otherwise) of a parsed sequence."""
    endless, ways = 0, 1.0
    for kind, argument in items:
        if kind in PLAIN:
            continue
        more, times = _one(kind, argument, repeated)
        endless, ways = endless + more, ways * times
    return endless, ways


def _one(kind: Any, argument: Any, repeated: bool) -> tuple[int, float]:
    if kind in REPEATS:
        low, high, items = argument
        if repeated and high != low:
            raise _TooMuchError("a repeat inside a repeat")
        more, times = _cost(items, repeated=repeated or high > 1)
        if high > MANY and high != low:
            return more + 1, times
        return more, times * (high - low + 1)
    if kind is kinds.SUBPATTERN:
        return _cost(argument[-1], repeated=repeated)
    if kind is kinds.ATOMIC_GROUP:
        return _cost(argument, repeated=repeated)
    if kind is kinds.BRANCH:
        if repeated:
            raise _TooMuchError("a choice inside a repeat")
        costs = [_cost(items, repeated=False) for items in argument[1]]
        return max(more for more, _ in costs), sum(times for _, times in costs)
    raise _TooMuchError("lookarounds, conditions and references")
