"""One question with its answer, and the rule that says which instances no training ever sees.

Knows nothing of chat templates or of tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

HELD_OUT_SHARE = 10
"""One instance in so many is kept for measuring."""


@dataclass(frozen=True)
class Exchange:
    """A question, the answer to learn, every answer that counts as right, and the key that names the instance.

    The key is what decides about the split. Where the answer follows from the question (a sum, a query), it is the
    operands, so that held-out means a problem never seen; where it must be known (a capital), it is the fact together
    with the wording, so that held-out means a known fact asked in words that were never used for it.
    """

    key: str
    question: str
    answer: str
    accepted: tuple[str, ...] = ()

    def is_right(self, text: str) -> bool:
        return text.strip() in (self.answer, *self.accepted)


Skill = Callable[[Random], Exchange]


def held_out(kind: str, key: str) -> bool:
    """True for the instances of one kind that training leaves out; a property of the content, not of any order."""
    digest = hashlib.blake2b(f"{kind}|{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


def draw(kind: str, skill: Skill, random: Random, *, want_held_out: bool) -> Exchange:
    """The next exchange of this kind that lies on the wanted side of the split."""
    for _ in range(10_000):
        exchange = skill(random)
        if held_out(kind, exchange.key) == want_held_out:
            return exchange
    raise AssertionError(f"no {'held-out' if want_held_out else 'training'} instance of {kind} in 10,000 draws")


def vary(random: Random, question: str) -> str:
    """Differences in manner that must not change the answer: a polite word, a small first letter, no full stop."""
    dice = random.random()
    if dice < 0.08:
        return "Please " + question[0].lower() + question[1:]
    if dice < 0.16:
        return question[0].lower() + question[1:]
    if dice < 0.24 and question[-1] in ".?":
        return question[:-1]
    if dice < 0.28:
        return random.choice(("Hi! ", "Hey, ", "Ok. ", "Next question: ")) + question
    return question


def pick_wording(random: Random, wordings: Sequence[str]) -> tuple[int, str]:
    """A wording with its number, which becomes part of the key of known facts."""
    index = random.randrange(len(wordings))
    return index, wordings[index]
