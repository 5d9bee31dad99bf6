"""A device without tensors: it keeps, for every slot of every block, which history of tokens the slot was computed from.

It executes steps as a runner would (copies, then all writes, then all reads, then draws) and asserts that each token finds
exactly its own sequence's history in its table. Drafts are written as they are, right or wrong, and verified by drawing. Knows
the scheduler only through steps and sequences.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

from quire.scheduler.prefix import next_key
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.sequence import Sequence
from quire.scheduler.step import PLACEHOLDER, Chunk, Step

ALPHABET = 3
Draw = Callable[[tuple[int, ...], int], int]


def draw(history: tuple[int, ...], sample: int) -> int:
    """The next token: a function of the sequence's own tokens and of which sample it is, of nothing else. It often repeats what
    stood two tokens before, so that drafts come true."""
    number = zlib.crc32(bytes((*history, 255, sample)))
    return history[-2] if number & 768 and len(history) > 1 else number % ALPHABET


def _verify(history: list[int], draft: tuple[int, ...], sample: int) -> list[int]:
    """The tokens drawn one after the other, as long as the draft foresaw them, and the first that it did not."""
    drawn: list[int] = []
    while len(drawn) <= len(draft) and tuple(drawn) == draft[: len(drawn)]:
        drawn.append(draw((*history, *drawn), sample))
    return drawn


class Histories:
    """Numbers for histories: equal numbers mean equal root and equal tokens up to and including a position."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[bytes | int, int], int] = {}

    def extend(self, before: bytes | int, token: int) -> int:
        return self._numbers.setdefault((before, token), len(self._numbers))


class Truth:
    """What one sequence really consists of, drawn tokens included that the host has not seen yet."""

    def __init__(self, histories: Histories, root: bytes, tokens: list[int], block_size: int) -> None:
        self.root, self.tokens, self.history, self.keys = root, [], [], []
        self._histories, self._block_size = histories, block_size
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.history.append(self._histories.extend(self.history[-1] if self.history else self.root, token))
        if len(self.tokens) % self._block_size == 0:
            parent = self.keys[-1] if self.keys else self.root
            self.keys.append(next_key(parent, self.tokens[-self._block_size :]))


class Device:
    """Slots of `num_blocks` blocks. epoch: raised when prefixes are forgotten; a slot is as old as the oldest it stands on."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size, self.epoch = num_blocks, block_size, 0
        self.truths: dict[int, Truth] = {}
        self.meaning: dict[bytes, int] = {}
        self._histories = Histories()
        self._slots: dict[tuple[int, int], tuple[int, int]] = {}

    def know(self, sequence: Sequence) -> None:
        """A sequence that the host has made: a request's first, or a beam's child."""
        self._learn(sequence.id, sequence.group.root, sequence.tokens)

    def run(self, step: Step, scheduler: Scheduler, admitted: set[int]) -> dict[int, list[int]]:
        """Execute; returns what was drawn. admitted: sequences that have entered with this step."""
        for source, target in step.copies:
            assert 1 <= source <= self.num_blocks
            assert 1 <= target <= self.num_blocks
            for offset in range(self.block_size):
                self._put((target, offset), self._slots.get((source, offset)))
        written: set[tuple[int, int]] = set()
        for chunk in step.chunks:
            assert chunk.sequence in self.truths, "a sequence is planned in the step that draws its first token"
            self._write(chunk, written)
        for chunk in step.chunks:
            self._check_view(chunk.sequence, chunk.blocks, self._history(chunk))
            if chunk.sequence in admitted:
                assert self._age(chunk.blocks, chunk.start) == self.epoch, "a prefix was found after it was to be forgotten"
        drawn = {}
        for chunk in step.chunks:
            history = self.truths[chunk.sequence].tokens
            known = chunk.start + len(chunk.tokens) - chunk.drafts
            assert not chunk.draws or len(history) == known, "a draw inside the known tokens"
            for number in chunk.draws:
                sequence = scheduler.sequence(number)
                assert sequence is not None
                if sequence.group.request.beam is None:
                    drawn[number] = _verify(history, chunk.draft, sequence.index)
                    self._learn(number, sequence.group.root, history)
        for number, tokens in drawn.items():
            for token in tokens:
                self._append(number, token)
        return drawn

    def check_view(self, number: int, blocks: tuple[int, ...] | list[int], length: int) -> None:
        """Assert that a table holds its sequence's first `length` tokens and nothing else."""
        self._check_view(number, blocks, self.truths[number].history[: max(0, length)])

    def _check_view(self, number: int, blocks: tuple[int, ...] | list[int], history: list[int]) -> None:
        for position in range(len(history)):
            slot = self._slots.get((blocks[position // self.block_size], position % self.block_size))
            assert slot is not None, f"position {position} of sequence {number} was never written"
            assert slot[0] == history[position], f"position {position} of sequence {number} holds another history"

    def check_keys(self, block_of: dict[bytes, int]) -> None:
        """Assert that each block that can be found by a key holds what the key says, in all its slots."""
        for key, block in block_of.items():
            assert key in self.meaning, f"block {block} is findable under a key of what no sequence consists of"
            slot = self._slots[block, self.block_size - 1]
            assert slot[0] == self.meaning[key], f"block {block} is findable under a key of other content"

    def _learn(self, number: int, root: bytes, tokens: list[int]) -> None:
        if number not in self.truths:
            truth = self.truths[number] = Truth(self._histories, root, tokens, self.block_size)
            for index, key in enumerate(truth.keys):
                self.meaning[key] = truth.history[(index + 1) * self.block_size - 1]

    def _append(self, number: int, token: int) -> None:
        truth = self.truths[number]
        truth.append(token)
        if len(truth.tokens) % self.block_size == 0:
            self.meaning[truth.keys[-1]] = truth.history[-1]

    def _write(self, chunk: Chunk, written: set[tuple[int, int]]) -> None:
        truth, end, history = self.truths[chunk.sequence], chunk.start + len(chunk.tokens), self._history(chunk)
        assert len(chunk.blocks) == -(-end // self.block_size), "the table does not cover the chunk exactly"
        assert all(1 <= block <= self.num_blocks for block in chunk.blocks)
        for position, token in enumerate(chunk.tokens, chunk.start):
            if position < end - chunk.drafts:
                assert token in (PLACEHOLDER, truth.tokens[position]), "a chunk with another sequence's token"
            slot = (chunk.blocks[position // self.block_size], position % self.block_size)
            assert slot not in written, "two tokens in one slot"
            written.add(slot)
            self._put(slot, (history[position], min(self.epoch, self._age(chunk.blocks, position))))

    def _history(self, chunk: Chunk) -> list[int]:
        """What the chunk's table is to hold when its tokens are written: the sequence's own history, then the draft's."""
        history = self.truths[chunk.sequence].history[: chunk.start + len(chunk.tokens) - chunk.drafts]
        for token in chunk.draft:
            history.append(self._histories.extend(history[-1], token))
        return history

    def _age(self, blocks: tuple[int, ...], length: int) -> int:
        """Epoch of the oldest of the first `length` slots."""
        if length == 0:
            return self.epoch
        before = length - 1
        return self._slots[blocks[before // self.block_size], before % self.block_size][1]

    def _put(self, slot: tuple[int, int], content: tuple[int, int] | None) -> None:
        if content is None:
            self._slots.pop(slot, None)
        else:
            self._slots[slot] = content
