"""Which adapters have a place in the running batch: at most `max_loras` different ones at a time, and nobody left behind.

To this room an adapter is a string, the digest of its content; the empty one is the base alone, which needs no place. A
sequence whose adapter has no place lets later ones pass, those of the base and of adapters that are running anyway - but of
the second only so many: then places are kept free for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from quire.scheduler.sequence import Sequence

# So many sequences with adapters may enter before one that came first and waits for a place.
MOST_PASSES = 32


class Places:
    """The adapters of the running sequences, and who waits for a place among them."""

    def __init__(self) -> None:
        self._running: Counter[str] = Counter()

    def enter(self, sequence: Sequence) -> None:
        """The sequence runs from now on."""
        if sequence.adapter:
            self._running[sequence.adapter] += 1

    def leave(self, sequence: Sequence) -> None:
        """The sequence no longer runs."""
        if sequence.adapter:
            self._running[sequence.adapter] -= 1
            if not self._running[sequence.adapter]:
                del self._running[sequence.adapter]

    def has(self, adapter: str, most: int) -> bool:
        """Whether a sequence with this adapter could run beside the others."""
        return not adapter or adapter in self._running or len(self._running) < most

    def first(self, waiting: Iterable[Sequence], most: int) -> Sequence | None:
        """The first that has something to compute and a place for its adapter. Who waits with nothing to compute (its last
        token is in flight, or its siblings') holds nobody up."""
        overdue = False
        for sequence in waiting:
            if not sequence.num_wanted:
                continue
            if self.has(sequence.adapter, most):
                if not (overdue and sequence.adapter):
                    return sequence
            elif sequence.num_passed >= MOST_PASSES:
                overdue = True
        return None

    def passed_by(self, sequence: Sequence, waiting: Iterable[Sequence]) -> None:
        """The sequence enters: note it with those before it that wait for a place."""
        if not sequence.adapter:
            return
        for before in waiting:
            if before.order > sequence.order:
                return
            if before.num_wanted:
                before.num_passed += 1

    def first_blocked(self, waiting: Iterable[Sequence], most: int) -> Sequence | None:
        """The first that has something to compute, if only its adapter's place is missing."""
        head = next((sequence for sequence in waiting if sequence.num_wanted), None)
        return head if head is not None and not self.has(head.adapter, most) else None

    def to_free(self, running: Iterable[Sequence], priority: int) -> str | None:
        """An adapter whose running sequences are all of less priority than `priority` (a larger number), the least of them."""
        best: dict[str, int] = {}
        for sequence in running:
            if sequence.adapter:
                best[sequence.adapter] = min(best.get(sequence.adapter, sequence.group.priority), sequence.group.priority)
        lower = [(rank, adapter) for adapter, rank in best.items() if rank > priority]
        return max(lower)[1] if lower else None
