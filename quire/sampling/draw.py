"""The number that decides a draw, counter-based.

There is no generator state to keep, share or lose: draw number `position` of a request is Philox4x32-10 (Salmon,
Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC11; the generator of Random123 and of CUDA)
with the seed as its key and the position as its counter. What is drawn by it: `ops.draw`.
"""

from __future__ import annotations

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
