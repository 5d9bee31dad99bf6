"""Rows seen as blocks of 128 tokens, so that a search over 150,000 logits touches most of them once, in float32.

Knows only tensors: no parameters, no requests. Two facts carry the file. The best token lies in the first of the
best blocks; the `count` best tokens lie in the `count` best blocks. Both hold with ties, because blocks and tokens
are ordered alike: larger value first, lower index first.

Why not `argmax`, `topk` and `sort` of torch on the whole row: on CPU `argmax` is several times slower than `amax`,
`topk` leaves the order of ties open, and a stable sort of one such row takes about 10 ms.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
SMALL_BLOCK = 8


def pad_to_blocks(logits: Tensor) -> Tensor:
    """[R, V] -> [R, N]: N is V rounded up to whole blocks, the rest is -inf. No copy where V already is whole."""
    missing = -logits.shape[-1] % BLOCK
    return torch.nn.functional.pad(logits, (0, missing), value=float("-inf")) if missing else logits


def best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Largest logit [R] and its lowest token id [R] of padded rows [R, N]. NaN counts as largest."""
    blocks = logits.unflatten(-1, (-1, BLOCK))
    peaks = blocks.amax(-1)
    block = peaks.argmax(-1, keepdim=True)  # the first of equal blocks
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, 1, BLOCK)).squeeze(1)
    offset = inside.argmax(-1, keepdim=True)
    return inside.gather(1, offset).squeeze(1), (block * BLOCK + offset).squeeze(1)


def largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest logits and their ids, both [R, count], best first, ties by lowest id; of padded rows [R, N]."""
    for size in (BLOCK, SMALL_BLOCK):
        if 2 * count * size <= logits.shape[-1]:  # worth it: the search halves at least
            return _largest_by_blocks(logits, count, size)
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    return values[:, :count], order[:, :count]


def _largest_by_blocks(logits: Tensor, count: int, size: int) -> tuple[Tensor, Tensor]:
    """`largest`, searched in the `count` best blocks of `size` only, kept in their old order so that ties stay in order."""
    blocks = logits.unflatten(-1, (-1, size))
    ranked = blocks.amax(-1).sort(dim=-1, descending=True, stable=True).indices
    chosen = ranked[:, :count].sort(dim=-1).values
    values, places = largest(blocks.gather(1, chosen.unsqueeze(-1).expand(-1, -1, size)).flatten(1), count)
    return values, chosen.gather(1, places // size) * size + places % size
