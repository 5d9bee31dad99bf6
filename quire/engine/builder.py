"""Step -> Batch: the scheduler's plain numbers as the tensors that a model takes. Knows no request.

Runs between two steps while the model waits, so nothing here loops over tokens or over the blocks of a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from quire.batch import Batch, KVCache
from quire.scheduler.step import PLACEHOLDER, Chunk, Step


@dataclass(frozen=True)
class Rows:
    """Where the wanted logits are among `batch.logit_rows`. draws: (chunk, its first place) - a chunk with drafts has one row
    more for each of them; prompt: (chunk, first place, first position, count) of prompt positions whose next token is to be
    scored. num_drawn: how many rows, the first ones, are drawn from."""

    draws: tuple[tuple[Chunk, int], ...]
    prompt: tuple[tuple[Chunk, int, int, int], ...]
    num_drawn: int


def build(step: Step, kv: KVCache, scored: Mapping[int, int], slot_of: Mapping[str, int] | None = None) -> tuple[Batch, Rows]:
    """The batch of a step. scored: prompt lengths of the sequences whose prompt tokens' log-probabilities are wanted.
    slot_of: the slots that the chunks' adapters are in."""
    size, chunks = kv.block_size, step.chunks
    counts = np.array([len(chunk.tokens) for chunk in chunks])
    begins = np.array([chunk.start for chunk in chunks])
    ends = counts.cumsum()
    starts = [0, *ends.tolist()]
    tokens = np.fromiter(chain.from_iterable(chunk.tokens for chunk in chunks), np.int64, starts[-1])
    assert tokens.min() > PLACEHOLDER, "this runner takes one step at a time: every token must be known"
    owners = np.repeat(np.arange(len(chunks)), counts)
    positions = np.arange(starts[-1]) + (begins - starts[:-1])[owners]
    tables = _tables(chunks)
    slots = tables[owners, positions // size] * size + positions % size
    logit_rows, rows = _rows(step, starts, scored)
    adapters = _adapters(chunks, counts, slot_of) if slot_of else None
    batch = Batch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        starts=tuple(starts),
        lengths=tuple((begins + counts).tolist()),
        kv=kv,
        block_tables=torch.from_numpy(tables),
        slots=torch.from_numpy(slots),
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        adapters=adapters,
    )
    return batch, rows


def _adapters(chunks: Sequence[Chunk], counts: np.ndarray, slot_of: Mapping[str, int]) -> torch.Tensor | None:
    """The slot of each row; None if all go through the base alone."""
    slots = np.array([slot_of[chunk.adapter] for chunk in chunks], np.int32)
    return torch.from_numpy(np.repeat(slots, counts)) if (slots >= 0).any() else None


def _tables(chunks: Sequence[Chunk]) -> np.ndarray:
    """[S, widest table] block numbers, the null block where a table ends."""
    widest = max(len(chunk.blocks) for chunk in chunks)
    padding = memoryview(bytes(8 * widest))
    # Tables are arrays of 64-bit numbers: they are laid end to end as they are, each with its padding.
    laid = bytearray().join(chain.from_iterable((chunk.blocks, padding[8 * len(chunk.blocks) :]) for chunk in chunks))
    return np.frombuffer(laid, np.int64).reshape(len(chunks), widest)


def _rows(step: Step, starts: list[int], scored: Mapping[int, int]) -> tuple[list[int], Rows]:
    """Rows that draw come first, then prompt rows, each in the order of the chunks."""
    draws, prompt = [], []
    logit_rows: list[int] = []
    for chunk, end in zip(step.chunks, starts[1:], strict=True):
        if chunk.draws:
            draws.append((chunk, len(logit_rows)))
            logit_rows.extend(range(end - 1 - chunk.drafts, end))
    num_drawn = len(logit_rows)
    for chunk, start in zip(step.chunks if scored else (), starts, strict=False):
        # Position p predicts token p + 1, so the prompt's last position is left to the draw.
        count = min(chunk.start + len(chunk.tokens), scored.get(chunk.sequence, 0) - 1) - chunk.start
        if count > 0:
            prompt.append((chunk, len(logit_rows), chunk.start, count))
            logit_rows.extend(range(start, start + count))
    return logit_rows, Rows(tuple(draws), tuple(prompt), num_drawn)
