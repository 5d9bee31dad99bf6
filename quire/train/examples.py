"""What a model is trained on: token sequences with a weight for each token. Knows no text and no model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One sequence. weights[i] says how much token i counts in the loss, predicted from what stands before it (0: not at all).

    line: where it comes from (from 1). prompt: how many tokens stand before the last answer. rejected: for DPO, the same
    prompt with the answer that is not wanted.
    """

    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    line: int = 0
    prompt: int = 0
    rejected: Example | None = None

    @property
    def supervised(self) -> int:
        """Tokens that count; the first of a sequence is predicted from nothing and never does."""
        return sum(weight > 0 for weight in self.weights[1:])

    @property
    def length(self) -> int:
        """Tokens that go through the model for it."""
        return len(self.tokens) + (0 if self.rejected is None else len(self.rejected.tokens))


def sequences_of(examples: Sequence[Example]) -> list[Example]:
    """Each example, and after it what is rejected in its place."""
    return [one for example in examples for one in (example, example.rejected) if one is not None]


def cut(examples: Sequence[Example], tokens: int) -> Iterator[list[Example]]:
    """In order, as many at once as have at most so many tokens together; a longer one alone."""
    micro: list[Example] = []
    room = tokens
    for example in examples:
        if micro and example.length > room:
            yield micro
            micro, room = [], tokens
        micro.append(example)
        room -= example.length
    if micro:
        yield micro
