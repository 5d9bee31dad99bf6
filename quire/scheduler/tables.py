"""Which blocks a sequence's tokens lie in: growth, sharing with copy-on-write, prefixes that others computed.

Knows the pool and single sequences; nothing of queues, budgets or who goes first.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable

from quire.scheduler.blocks import BlockPool
from quire.scheduler.limits import Limits
from quire.scheduler.prefix import next_key
from quire.scheduler.sequence import Sequence

NEVER = sys.maxsize


class Tables:
    """The block tables of all sequences over one pool."""

    def __init__(self, limits: Limits, pool: BlockPool) -> None:
        self._limits = limits
        self._pool = pool

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._limits.block_size)

    def promised(self, sequence: Sequence) -> int:
        """Blocks that the sequence has yet to take for what is known of it; drafts may have taken more."""
        return max(0, self.blocks_for(sequence.num_known) - len(sequence.blocks))

    # -- growth and sharing -------------------------------------------------------------------------------------------

    def reserve(self, sequence: Sequence, count: int, copies: list[tuple[int, int]]) -> bool:
        """Give the next `count` tokens blocks of their own, adding to `copies`; False, and no change, if blocks are short."""
        blocks, pool, size = sequence.blocks, self._pool, self._limits.block_size
        tail, offset = divmod(sequence.num_computed, size)
        missing = -(-(sequence.num_computed + count) // size) - len(blocks)
        # A half-filled block that others hold too is left to them: the next token would be written into their future.
        shared = offset and pool.holders(blocks[tail]) > 1
        if not missing and not shared:
            return True
        if missing + bool(shared) > pool.num_free:
            return False
        blocks = sequence.blocks = blocks[:]  # steps in flight have the old table
        if shared:
            own = pool.take()
            copies.append((blocks[tail], own))
            pool.release(blocks[tail])
            blocks[tail] = own
        for _ in range(missing):
            blocks.append(pool.take())
        return True

    def shrink(self, sequence: Sequence, length: int) -> None:
        """Only the first `length` tokens count as computed: what was written behind them was a guess. Blocks that held nothing
        else go back. No change for a sequence that has lost its blocks meanwhile."""
        if length >= sequence.num_computed:
            return
        sequence.num_computed, kept = length, self.blocks_for(length)
        if kept < len(sequence.blocks):
            self._pool.release_all(sequence.blocks[kept:])
            sequence.blocks = sequence.blocks[:kept]

    def share(self, parent: Sequence, child: Sequence) -> None:
        """The child begins with all that the parent has computed."""
        for block in parent.blocks:
            self._pool.share(block)
        child.blocks, child.keys, child.num_registered = parent.blocks, list(parent.keys), parent.num_registered
        child.num_computed, child.num_cached = parent.num_computed, parent.num_cached

    def give_back(self, sequence: Sequence) -> None:
        """Release the sequence's blocks: nothing of it is computed any more."""
        self._pool.release_all(sequence.blocks)
        sequence.blocks, sequence.num_computed, sequence.num_registered = array("q"), 0, 0

    # -- prefixes -----------------------------------------------------------------------------------------------------

    def reads_prefixes(self, sequence: Sequence) -> bool:
        return self._limits.prefix_caching and not sequence.group.request.params.skip_reading_prefix_cache

    def find(self, sequence: Sequence) -> list[int]:
        """Findable blocks of the sequence's longest known prefix; at least one token is left to compute."""
        if not self.reads_prefixes(sequence):
            return []
        size = self._limits.block_size
        self._extend_keys(sequence, len(sequence.tokens) // size)
        found = []
        for key in sequence.keys[: (sequence.num_known - 1) // size]:
            block = self._pool.find(key)
            if block is None:
                break
            found.append(block)
        return found

    def cost_of_entry(self, sequence: Sequence, found: list[int]) -> int:
        """Free blocks that the known tokens take, all of them, if the sequence begins with `found`: cached blocks that are
        revived leave the free ones as well."""
        revived = sum(1 for block in found if self._pool.holders(block) == 0)
        return self.blocks_for(sequence.num_known) - len(found) + revived

    def begin(self, sequence: Sequence, found: list[int]) -> None:
        """Enter with the blocks that `find` gave."""
        for block in found:
            self._pool.share(block)
        sequence.blocks = array("q", found)
        sequence.num_computed = len(found) * self._limits.block_size
        sequence.num_registered = len(found)

    def register(self, sequence: Sequence) -> None:
        """Make the full blocks findable. They may still be in flight: whoever finds them runs after, or in the same step,
        where all keys are written before any is read."""
        if not self._limits.prefix_caching:
            return
        full = min(sequence.num_computed, len(sequence.tokens)) // self._limits.block_size
        if full <= sequence.num_registered:
            return
        self._extend_keys(sequence, full)
        for number in range(sequence.num_registered, full):
            self._pool.register(sequence.blocks[number], sequence.keys[number])
        sequence.num_registered = full

    def forget(self, sequences: Iterable[Sequence]) -> None:
        """Nothing computed so far will be found. What a sequence adds to its present blocks stands on them, so that none of it
        will be, until it has given them back."""
        self._pool.forget()
        for sequence in sequences:
            if sequence.blocks:
                sequence.num_registered = NEVER

    def _extend_keys(self, sequence: Sequence, blocks: int) -> None:
        size = self._limits.block_size
        while len(sequence.keys) < blocks:
            number = len(sequence.keys)
            parent = sequence.keys[-1] if number else sequence.group.root
            sequence.keys.append(next_key(parent, sequence.tokens[number * size : (number + 1) * size]))
