"""The pool of KV blocks: who holds which, what is cached, what can be evicted. Pure counting; contents are elsewhere.

Each block is in exactly one state: empty (no content), cached (content under a key, held by nobody, evictable, oldest
first) or held (by one or more tables). Block 0 is the null block: it pads tables and is never handed out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class BlockPool:
    """`num_blocks` usable blocks, numbered from 1."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._empty = list(range(num_blocks, 0, -1))
        self._cached: OrderedDict[int, bytes] = OrderedDict()
        self._holders = [0] * (num_blocks + 1)
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `take` can give: empty and cached ones."""
        return len(self._empty) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_free

    def holders(self, block: int) -> int:
        """How many tables list the block."""
        return self._holders[block]

    def take(self) -> int:
        """An empty block, held once; the least recently used cached block is evicted when there is no other."""
        if self._empty:
            block = self._empty.pop()
        else:
            assert self._cached, "take() from a pool with nothing free"
            block, key = self._cached.popitem(last=False)
            del self._key_of[block], self._block_of[key]
        self._holders[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more table lists the block, which is held or cached."""
        if self._holders[block] == 0:
            del self._cached[block]
        self._holders[block] += 1

    def release(self, block: int) -> None:
        """One table less lists the block; the last one makes it cached (if it has a key) or empty."""
        assert self._holders[block] > 0, f"block {block} released more often than it was held"
        self._holders[block] -= 1
        if self._holders[block] == 0:
            key = self._key_of.get(block)
            if key is None:
                self._empty.append(block)
            else:
                self._cached[block] = key

    def release_all(self, blocks: Sequence[int]) -> None:
        """Release a table from its tail, so that of one sequence the tail is evicted first."""
        for block in reversed(blocks):
            self.release(block)

    def find(self, key: bytes) -> int | None:
        """The block with the content of `key`."""
        return self._block_of.get(key)

    def register(self, block: int, key: bytes) -> None:
        """The held block is full and has the content of `key`. A second block of equal content stays without a key."""
        assert self._holders[block] > 0, f"block {block} registered while nobody holds it"
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def forget(self) -> None:
        """Drop every key: nothing computed so far will be found again."""
        self._empty.extend(self._cached)
        self._cached.clear()
        self._key_of.clear()
        self._block_of.clear()

    def check(self) -> None:
        """Assert the invariants (tests, and the engine when it is idle)."""
        held = {block for block in range(1, self.num_blocks + 1) if self._holders[block] > 0}
        empty, cached = set(self._empty), set(self._cached)
        assert len(empty) == len(self._empty), "a block is empty twice"
        assert len(held | empty | cached) == len(held) + len(empty) + len(cached), "a block is in two states"
        assert len(held) + len(empty) + len(cached) == self.num_blocks, "a block is lost"
        assert self._holders[0] == 0, "the null block is held"
        assert {key: block for block, key in self._key_of.items()} == self._block_of, "keys and blocks disagree"
        assert not empty & set(self._key_of), "an empty block has a key"
