"""The draw: a counter-based random number, and the inverse of a cumulative distribution.

There is no generator state to keep, share or lose: draw number `position` of a request is Philox4x32-10 (Salmon,
Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC11; the generator of Random123 and of CUDA)
with the seed as its key and the position as its counter. This file knows weights, not logits; they need not sum to 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.sampling.blocks import BLOCK

_WORD = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10: four 32-bit words from a counter of four and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (product_1 >> 32) ^ c1 ^ k0, product_1 & _WORD, (product_0 >> 32) ^ c3 ^ k1, product_0 & _WORD
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1), with 53 bits, that belongs to this seed and this position."""
    low, high, _, _ = philox((position & _WORD, (position >> 32) & _WORD, 0, 0), (seed & _WORD, (seed >> 32) & _WORD))
    return ((high << 32 | low) >> 11) * 2.0**-53


def draw_in_token_order(weights: Tensor, masses: Tensor, uniforms: Tensor) -> Tensor:
    """Token ids [R] from weights [R, N], their running block masses [R, N / BLOCK] and one uniform per row.

    The inverse of the cumulative distribution in order of token ids: first the block, then the token within it.
    """
    total = masses[:, -1:]
    block = _invert(masses, uniforms.unsqueeze(1), total)
    before = torch.where(block > 0, masses.gather(1, (block - 1).clamp(min=0)), 0.0)
    # Where in the block's mass the target fell is a uniform number again.
    share = (uniforms.unsqueeze(1) * total - before) / (masses.gather(1, block) - before)
    inside = weights.unflatten(-1, (-1, BLOCK)).gather(1, block.unsqueeze(-1).expand(-1, 1, BLOCK)).squeeze(1)
    sums = inside.double().cumsum(-1)
    return (block * BLOCK + _invert(sums, share, sums[:, -1:])).squeeze(1)


def draw_in_given_order(sums: Tensor, kept: Tensor, uniforms: Tensor) -> Tensor:
    """Places [R] drawn from running sums [R, K] of which the first `kept` [R] entries count."""
    return _invert(sums, uniforms.unsqueeze(1), sums.gather(1, kept.unsqueeze(1) - 1)).squeeze(1)


def _invert(sums: Tensor, share: Tensor, end: Tensor) -> Tensor:
    """First place [R, 1] where the running sums [R, K] exceed share * end, both [R, 1]: never a place of weight zero."""
    place = torch.searchsorted(sums, share * end, right=True)
    # Should rounding lift the target to the very end, the first place that reaches the end is meant.
    return torch.minimum(place, torch.searchsorted(sums, end.contiguous()))
