"""A step becomes the batch that it describes: the builder against plain loops over tokens."""

from __future__ import annotations

import random
from array import array

import pytest
import torch

from quire.batch import KVCache
from quire.engine.builder import build
from quire.scheduler.step import Chunk, Step


@pytest.mark.parametrize("seed", range(20))
def test_every_token_has_its_position_and_its_slot(seed: int) -> None:
    draw = random.Random(seed)
    size = draw.choice([1, 2, 4, 16])
    chunks = []
    for number in range(draw.randint(1, 9)):
        start, count = draw.randint(0, 40), draw.randint(1, 30)
        blocks = array("q", [draw.randint(1, 999) for _ in range(-(-(start + count) // size))])
        tokens = tuple(draw.randrange(50_000) for _ in range(count))
        draws = draw.choice([(), (number,), (number, 100 + number)])
        drafts = draw.randint(0, count - 1) if len(draws) == 1 else 0
        chunks.append(Chunk(number, start, tokens, blocks, draws, drafts))
    scored = {number: draw.randint(1, 60) for number in range(len(chunks)) if draw.random() < 0.4}
    kv = KVCache([torch.empty(1, size, 1, 1)], [torch.empty(1, size, 1, 1)])
    batch, rows = build(Step(1, tuple(chunks)), kv, scored)

    places = [(chunk, chunk.start + offset, token) for chunk in chunks for offset, token in enumerate(chunk.tokens)]
    assert batch.tokens.tolist() == [token for _, _, token in places]
    assert batch.positions.tolist() == [position for _, position, _ in places]
    assert batch.slots.tolist() == [chunk.blocks[position // size] * size + position % size for chunk, position, _ in places]
    assert batch.lengths == tuple(chunk.start + len(chunk.tokens) for chunk in chunks)
    for row, chunk in zip(batch.block_tables.tolist(), chunks, strict=True):
        assert row == [*chunk.blocks, *[0] * (len(row) - len(chunk.blocks))]
    at = [places[row][:2] for row in batch.logit_rows.tolist()]
    for chunk, place in rows.draws:
        end = chunk.start + len(chunk.tokens)
        drawn_from = at[place : place + chunk.drafts + 1]
        assert drawn_from == [(chunk, position) for position in range(end - 1 - chunk.drafts, end)]
    assert rows.num_drawn == sum(chunk.drafts + 1 for chunk, _ in rows.draws)
    assert [chunk for chunk, _ in rows.draws] == [chunk for chunk in chunks if chunk.draws]
    wanted = [
        (chunk, position)
        for chunk, position, _ in places
        if chunk.sequence in scored and position < scored[chunk.sequence] - 1
    ]
    assert at[rows.num_drawn :] == wanted
    assert [(chunk, first, count) for chunk, _, first, count in rows.prompt] == [
        (chunk, chunk.start, sum(other is chunk for other, _ in wanted))
        for chunk in chunks
        if any(other is chunk for other, _ in wanted)
    ]
