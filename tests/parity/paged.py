"""Drives a model through the paged cache by hand: what the engine's builder does, in a page and without a scheduler."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quire.batch import Batch, KVCache, packed
from quire.models.decoder import CausalLM

BLOCK_SIZE = 16


class Cache:
    """A pool of blocks, NaN where nothing was written, and a shuffled table of blocks for each of `count` sequences."""

    def __init__(self, model: CausalLM, count: int, longest: int, seed: int = 0) -> None:
        config = model.config
        each = -(-longest // BLOCK_SIZE)
        blocks = count * each + 3
        shape = (blocks, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
        dtype = next(model.parameters()).dtype
        self.kv = KVCache(
            keys=[torch.full(shape, torch.nan, dtype=dtype) for _ in range(config.num_layers)],
            values=[torch.full(shape, torch.nan, dtype=dtype) for _ in range(config.num_layers)],
        )
        order = 1 + torch.randperm(blocks - 1, generator=torch.Generator().manual_seed(seed))
        self.tables = order[: count * each].view(count, each)
        self.computed = [0] * count

    def batch(self, chunks: dict[int, Sequence[int]]) -> Batch:
        """The next tokens of some of the sequences, by number."""
        starts, tokens, positions, slots = [0], [], [], []
        for number, chunk in chunks.items():
            places = torch.arange(self.computed[number], self.computed[number] + len(chunk))
            self.computed[number] += len(chunk)
            starts.append(starts[-1] + len(chunk))
            tokens.append(torch.tensor(chunk))
            positions.append(places)
            slots.append(self.tables[number][places // BLOCK_SIZE] * BLOCK_SIZE + places % BLOCK_SIZE)
        return Batch(
            tokens=torch.cat(tokens),
            positions=torch.cat(positions),
            starts=tuple(starts),
            lengths=tuple(self.computed[number] for number in chunks),
            kv=self.kv,
            block_tables=self.tables[list(chunks)],
            slots=torch.cat(slots),
        )


@torch.no_grad()
def packed_logits(model: CausalLM, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits of each sequence, computed as training does: laid end to end, without a cache."""
    batch = packed(sequences)
    return list(model.logits(model(batch)).split([len(sequence) for sequence in sequences]))


@torch.no_grad()
def chunked_logits(model: CausalLM, tokens: Sequence[int], chunks: Sequence[int], seed: int = 0) -> Tensor:
    """Logits of one sequence through the cache; `chunks` are the sizes of the first steps, the rest goes token by token."""
    cache = Cache(model, 1, len(tokens), seed)
    out, done = [], 0
    sizes = [*chunks, *([1] * (len(tokens) - sum(chunks)))]
    for size in sizes:
        out.append(model.logits(model(cache.batch({0: tokens[done : done + size]}))))
        done += size
    return torch.cat(out)


@torch.no_grad()
def greedy(model: CausalLM, prompt: Sequence[int], count: int) -> list[int]:
    """`count` tokens after the prompt, each the likeliest."""
    cache = Cache(model, 1, len(prompt) + count)
    tokens, chunk = [], list(prompt)
    while len(tokens) < count:
        logits = model.logits(model(cache.batch({0: chunk})))
        tokens.append(int(logits[-1].argmax()))
        chunk = tokens[-1:]
    return tokens
