"""Small steps without Python's share: the decoder's native calls are written down once for a shape of batch and made again.

A step of one row spends a sixth of its time between two kernels. What is written down reads its inputs from tensors of its
own, so a batch is copied there first. What is in the slots of adapters is a part of what was written: when it changes, steps
with adapters are written anew. Steps that compute something outside of the native kernels go the ordinary way, with the same
bits. Knows no request.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quire import ops
from quire.batch import Batch
from quire.log import logger
from quire.models.decoder import CausalLM

log = logger(__name__)

# Beyond it the arithmetic takes so much longer that Python's share does not matter.
MOST_ROWS = 64
MOST_BYTES = 64 << 20
TABLE_STEP = 32  # blocks by which the tables of a shape grow
SHORTEST_REACH = 256

BASE = -1  # the version of steps without adapters

Shape = tuple[int, int, int, int]  # rows, sequences, width of the tables, version of the slots


@dataclass(frozen=True)
class _Recorded:
    tape: Any
    batch: Batch
    reach: int  # of the longest sequence that it may be used for

    def run(self, batch: Batch) -> Tensor:
        width = batch.block_tables.shape[1]
        self.batch.tokens.copy_(batch.tokens)
        self.batch.positions.copy_(batch.positions)
        self.batch.slots.copy_(batch.slots)
        self.batch.block_tables[:, :width].copy_(batch.block_tables)
        if batch.adapters is not None:
            self.batch.adapters.copy_(batch.adapters)
        return self.tape.replay(batch.starts, batch.lengths).clone()


class Replay:
    """The decoder of `model` on batches with a cache."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self._recorded: OrderedDict[Shape, _Recorded] = OrderedDict()
        self._seen: set[Shape] = set()
        self._bytes = 0
        self._reached = 0  # how long sequences may be before tables of positions grow, which is torch's work
        self._refused: set[int] = set()  # versions
        self._version = BASE

    def __call__(self, batch: Batch, version: int = BASE) -> Tensor:
        """What `model(batch)` gives, bit for bit. version: of the slots that the batch's adapters are in."""
        rows = len(batch.tokens)
        if version != BASE:
            self.forget_slots_but(version)
        longest = max(batch.lengths)
        if version in self._refused or rows > MOST_ROWS:
            return self._ordinary(batch, longest)
        width = -(-batch.block_tables.shape[1] // TABLE_STEP) * TABLE_STEP
        shape = (rows, len(batch.lengths), width, version)
        recorded = self._recorded.get(shape)
        if recorded is not None and longest <= recorded.reach:
            self._recorded.move_to_end(shape)
            hidden = recorded.run(batch)
        elif shape in self._seen and longest <= self._reached:
            hidden = self._record(shape, batch)
        else:
            self._seen.add(shape)
            return self._ordinary(batch, longest)
        # Most often each row's logits are wanted, in order.
        wanted = batch.logit_rows
        return hidden if len(wanted) == rows and torch.equal(wanted, torch.arange(rows)) else hidden[wanted]

    def _ordinary(self, batch: Batch, longest: int) -> Tensor:
        self._reached = max(self._reached, reach(longest))
        return self.model(batch)

    def _record(self, shape: Shape, batch: Batch) -> Tensor:
        own = replace(
            batch,
            tokens=batch.tokens.clone(),
            positions=batch.positions.clone(),
            slots=batch.slots.clone(),
            block_tables=batch.block_tables.new_zeros(shape[1], shape[2]),
            logit_rows=None,
            adapters=None if batch.adapters is None else batch.adapters.clone(),
        )
        own.block_tables[:, : batch.block_tables.shape[1]].copy_(batch.block_tables)
        tape = ops.record(lambda: self.model(own), live=(own.starts, own.lengths))
        if tape is None or tape.refused:
            self._refused.add(shape[3])
            log.debug("steps are not replayed: %s", "no native kernels" if tape is None else tape.refused)
            return self.model(own) if tape is None else tape.result
        self._forget(shape)
        self._recorded[shape] = _Recorded(tape, own, self._reached)
        self._bytes += tape.bytes
        while self._bytes > MOST_BYTES and len(self._recorded) > 1:
            self._forget(next(iter(self._recorded)))
        return tape.result.clone()

    def forget_slots_but(self, version: int) -> None:
        """Steps that were written with something else in the slots are of no more use, and keep that alive."""
        if version != self._version:
            self._forget_version(self._version)
            self._version = version

    def _forget_version(self, version: int) -> None:
        if version == BASE:
            return
        for shape in [shape for shape in self._recorded if shape[3] == version]:
            self._forget(shape)
        self._seen = {shape for shape in self._seen if shape[3] != version}
        self._refused.discard(version)

    def _forget(self, shape: Shape) -> None:
        old = self._recorded.pop(shape, None)
        if old is not None:
            self._bytes -= old.tape.bytes


def reach(length: int) -> int:
    """How long sequences may become before tables of positions grow again, once `Rope.reach` was told this length."""
    return max(SHORTEST_REACH, 1 << (length - 1).bit_length())
