"""Drafts join a step last, and leave it again when they did not come true.

A draft is nothing but tokens behind the known ones: computed with them in one chunk, known if the model draws them itself. They
take what nobody else wants: rows while the step is small, tokens of its budget, free blocks. Nobody waits or gives way for a
draft. Until the step's tokens are there, its sequence has nothing else to compute. Knows no queues.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from quire.scheduler.lookup import Lookup
from quire.scheduler.sequence import Sequence
from quire.scheduler.step import Chunk
from quire.scheduler.tables import Tables
from quire.speculation import Speculation

# What a step costs before its first row, in rows: measured as 12 on the 0.5 B shape (docs/decisions/0007-speculation.md).
FIXED_ROWS = 12
# No token is drafted whose chance to come true is estimated below this, however small the step.
LEAST = 0.3


@dataclass
class SpeculationCounters:
    """Totals. accepted_at: how often the draft's token at each place came true."""

    drafts: int = 0
    draft_tokens: int = 0
    accepted_at: list[int] = field(default_factory=list)

    @property
    def accepted(self) -> int:
        return sum(self.accepted_at)

    def copy(self) -> SpeculationCounters:
        return SpeculationCounters(self.drafts, self.draft_tokens, list(self.accepted_at))

    def since(self, before: SpeculationCounters) -> SpeculationCounters:
        """What was added after the copy `before` was taken."""
        earlier = before.accepted_at + [0] * (len(self.accepted_at) - len(before.accepted_at))
        added = [now - then for now, then in zip(self.accepted_at, earlier, strict=True)]
        return SpeculationCounters(self.drafts - before.drafts, self.draft_tokens - before.draft_tokens, added)

    def count(self, drafted: int, accepted: int) -> None:
        self.drafts += 1
        self.draft_tokens += drafted
        self.accepted_at += [0] * (drafted - len(self.accepted_at))
        for place in range(accepted):
            self.accepted_at[place] += 1


class Speculator:
    """Adds drafts to planned steps and takes back what was wrong."""

    def __init__(self, rules: Speculation, tables: Tables) -> None:
        self.counters = SpeculationCounters()
        self._rules, self._tables = rules, tables

    def extend(
        self, chunks: list[Chunk], sequences: Mapping[int, Sequence], used: int, budget: int, copies: list[tuple[int, int]]
    ) -> None:
        """Append drafts to `chunks` of a step that has `used` tokens and may take `budget` more."""
        room = min(self._rules.most_rows - used, budget)
        if room <= 0:
            return
        able = [place for place, chunk in enumerate(chunks) if _may_draft(chunk, sequences[chunk.sequence])]
        for left, place in zip(range(len(able), 0, -1), able, strict=True):
            # An equal share of the rows for each, and what one does not need for those after it.
            drafted = self._draft(chunks, place, sequences[chunks[place].sequence], -(-room // left), used, copies)
            room -= drafted
            used += drafted

    def _draft(
        self, chunks: list[Chunk], place: int, sequence: Sequence, room: int, rows: int, copies: list[tuple[int, int]]
    ) -> int:
        """Append at most `room` tokens to one chunk of a step of `rows` rows; returns how many."""
        # One more token is drawn than is drafted.
        most = min(room, sequence.max_length - len(sequence.tokens) - 1)
        if most <= 0:
            return 0
        if sequence.lookup is None:
            sequence.lookup = Lookup(self._rules)
        # A row more is worth it if it brings tokens at a better rate than the step has without it.
        draft = sequence.lookup.propose(sequence.tokens, most, max(LEAST, rows / (rows + FIXED_ROWS)))
        if not draft or not self._tables.reserve(sequence, len(draft), copies):
            return 0
        chunk = chunks[place]
        chunks[place] = chunk._replace(tokens=chunk.tokens + draft, blocks=sequence.blocks, drafts=len(draft))
        sequence.num_computed += len(draft)
        sequence.num_drafts = len(draft)
        return len(draft)

    def settle(self, sequence: Sequence, chunk: Chunk, drawn: int) -> None:
        """The chunk gave `drawn` tokens: as many of its tokens, counted from the first, are right, and the others were never
        there."""
        sequence.num_drafts = 0
        self._tables.shrink(sequence, chunk.start + drawn)
        sequence.lookup.learn(chunk.drafts, drawn - 1)
        self.counters.count(chunk.drafts, drawn - 1)


def _may_draft(chunk: Chunk, sequence: Sequence) -> bool:
    """Whether the chunk is one known token that draws the next, with nothing else of its sequence in flight. Beams draw several
    next tokens, and the samples of a prompt part at one place: neither has a draft."""
    if len(chunk.tokens) != 1 or len(chunk.draws) != 1 or sequence.num_pending != 1:
        return False
    return sequence.group.request.beam is None
