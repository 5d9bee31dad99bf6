"""The value that travels from the scheduler to the runner: which tokens of which sequences, in which blocks."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import NamedTuple

PLACEHOLDER = -1


class Chunk(NamedTuple):
    """Consecutive tokens of one sequence. tokens: PLACEHOLDER where an earlier step, still in flight, draws the token.
    blocks: the table that covers start + len(tokens) positions; an array, as it goes to the device without a loop, and never
    changed, as steps may be in flight. draws: the sequences whose next token is drawn from the last row (several when a
    prompt's samples part, none inside a prompt). drafts: so many last tokens are only guessed; then a token is drawn from each
    of them and from the token before them, and counts as long as the tokens before it are those that were drawn. adapter:
    digest of what the tokens go through beside the model, empty for nothing."""

    sequence: int
    start: int
    tokens: tuple[int, ...]
    blocks: array[int]
    draws: tuple[int, ...]
    drafts: int = 0
    adapter: str = ""

    @property
    def draft(self) -> tuple[int, ...]:
        """The guessed tokens."""
        return self.tokens[len(self.tokens) - self.drafts :]


@dataclass(frozen=True)
class Step:
    """copies: (from, to) blocks to copy, in order, before anything is written. preempted: sequences that lost their blocks."""

    number: int
    chunks: tuple[Chunk, ...]
    copies: tuple[tuple[int, int], ...] = ()
    preempted: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.chunks)
