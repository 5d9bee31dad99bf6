"""One list of shapes for every implementation of the operations, and the plain float64 meaning of attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

THREADS = (1, 2)
DTYPES = (torch.float32, torch.bfloat16)
# (inputs, outputs): odd, tiny, a real layer's
LINEAR = ((48, 97), (13, 7), (1, 5), (64, 64), (256, 512), (1000, 33))
# Where a run of rows is cut: borders of the groups and tiles that implementations like, and one off them.
CHUNKS = ((1,) * 12, (2, 3, 5, 7, 11, 13), (15, 16, 17), (8, 1, 64, 1), (63, 65), (129,), (31, 100))


@dataclass(frozen=True)
class AttentionShape:
    """H heads, K kv heads, D head size, and what narrows or bends the scores."""

    heads: int
    kv_heads: int
    size: int
    window: int | None = None
    softcap: float | None = None
    block: int = 16

    def __str__(self) -> str:
        return f"{self.heads}x{self.kv_heads}x{self.size}-w{self.window}-c{self.softcap}-b{self.block}"


ATTENTION = (
    AttentionShape(4, 4, 16),
    AttentionShape(4, 2, 12, window=10),
    AttentionShape(6, 1, 20, softcap=3.0, block=32),
    AttentionShape(3, 3, 7, window=150, softcap=2.0),
    AttentionShape(14, 2, 64, block=8),
    AttentionShape(2, 2, 128, window=1),
)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """The number of threads of torch, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def borders(total: int, chunks: tuple[int, ...]) -> list[tuple[int, int]]:
    """[start, end) of the chunks as far as they go, the rest as one."""
    out, start = [], 0
    for size in (*chunks, total):
        end = min(start + size, total)
        if end > start:
            out.append((start, end))
        start = end
    return out


def exact_attention(q: Tensor, k: Tensor, v: Tensor, shape: AttentionShape) -> Tensor:
    """One sequence, q [T, H, D], k, v [T, K, D], as the formula says, in their own type."""
    count = len(q)
    k, v = (t.repeat_interleave(shape.heads // shape.kv_heads, dim=1) for t in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * shape.size**-0.5
    if shape.softcap is not None:
        scores = shape.softcap * torch.tanh(scores / shape.softcap)
    distance = torch.arange(count)[:, None] - torch.arange(count)
    hidden = (distance < 0) | (distance >= (shape.window or count))
    return torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
