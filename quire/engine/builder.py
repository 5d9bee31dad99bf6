"""Step -> Batch: the scheduler's plain numbers as the tensors that a model takes. Knows no request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from quire.batch import Batch, KVCache
from quire.scheduler.step import PLACEHOLDER, Chunk, Step


@dataclass(frozen=True)
class Rows:
    """Where the wanted logits are among `batch.logit_rows`. draws: (chunk, its place); prompt: (chunk, first place, first
    position, count) of prompt positions whose next token is to be scored."""

    draws: tuple[tuple[Chunk, int], ...]
    prompt: tuple[tuple[Chunk, int, int, int], ...]


def build(step: Step, kv: KVCache, scored: Mapping[int, int]) -> tuple[Batch, Rows]:
    """The batch of a step. scored: prompt lengths of the sequences whose prompt tokens' log-probabilities are wanted."""
    block_size = kv.block_size
    counts = [len(chunk.tokens) for chunk in step.chunks]
    starts = [0, *np.cumsum(counts).tolist()]
    tokens = np.fromiter((token for chunk in step.chunks for token in chunk.tokens), np.int64, starts[-1])
    assert tokens.min() > PLACEHOLDER, "this runner takes one step at a time: every token must be known"
    positions = np.concatenate([np.arange(chunk.start, chunk.start + n) for chunk, n in zip(step.chunks, counts, strict=True)])
    widest = max(len(chunk.blocks) for chunk in step.chunks)
    tables = np.zeros((len(step.chunks), widest), np.int64)
    for row, chunk in zip(tables, step.chunks, strict=True):
        row[: len(chunk.blocks)] = chunk.blocks
    owners = np.repeat(np.arange(len(counts)), counts)
    slots = tables[owners, positions // block_size] * block_size + positions % block_size
    logit_rows, rows = _rows(step, starts, scored)
    batch = Batch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        starts=tuple(starts),
        lengths=tuple(chunk.start + n for chunk, n in zip(step.chunks, counts, strict=True)),
        kv=kv,
        block_tables=torch.from_numpy(tables),
        slots=torch.from_numpy(slots),
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
    )
    return batch, rows


def _rows(step: Step, starts: list[int], scored: Mapping[int, int]) -> tuple[list[int], Rows]:
    """Rows that draw come first, then prompt rows, each in the order of the chunks."""
    draws = [(chunk, end - 1) for chunk, end in zip(step.chunks, starts[1:], strict=True) if chunk.draws]
    logit_rows = [row for _, row in draws]
    prompt = []
    for chunk, start in zip(step.chunks, starts, strict=False):
        # Position p predicts token p + 1, so the prompt's last position is left to the draw.
        count = min(chunk.start + len(chunk.tokens), scored.get(chunk.sequence, 0) - 1) - chunk.start
        if count > 0:
            prompt.append((chunk, len(logit_rows), chunk.start, count))
            logit_rows.extend(range(start, start + count))
    return logit_rows, Rows(tuple((chunk, place) for place, (chunk, _) in enumerate(draws)), tuple(prompt))
