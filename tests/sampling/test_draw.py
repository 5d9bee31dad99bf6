"""The counter-based generator: published vectors, uniformity, independence of neighbours; and the inverse of sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from quire import ops
from quire.sampling.draw import philox, uniform

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_vectors(counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    """The known answers of Random123 (`kat_vectors`, philox4x32 10)."""
    assert philox(counter, key) == expected


def test_uniform_is_in_range_and_has_53_bits() -> None:
    assert uniform(0, 0) == ((0xE169C58D << 32 | 0x6627E8D5) >> 11) / 2**53
    numbers = [uniform(seed, position) for seed in range(40) for position in range(40)]
    assert all(0.0 <= number < 1.0 for number in numbers)
    assert len(set(numbers)) == len(numbers)
    assert any(int(number * 2**53) & 1 for number in numbers)


@pytest.mark.parametrize("by", ["position", "seed", "high bits of the seed"])
def test_uniform_is_uniform_and_neighbours_are_independent(by: str) -> None:
    keys = {
        "position": lambda at: (99, at),
        "seed": lambda at: (at, 0),
        "high bits of the seed": lambda at: (at << 40, 3),
    }[by]
    numbers = np.array([uniform(*keys(at)) for at in range(20_000)])
    assert stats.kstest(numbers, "uniform").pvalue > 0.001
    pairs, _, _ = np.histogram2d(numbers[:-1], numbers[1:], bins=10, range=[[0, 1], [0, 1]])
    assert stats.chisquare(pairs.ravel()).pvalue > 0.001
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.025


def drawn(logits: torch.Tensor, uniform: float, top_p: float = 1.0) -> int:
    numbers = [torch.tensor([value], dtype=torch.float64) for value in (1.0, 0.0, top_p, uniform)]
    return int(ops.draw(logits, *numbers[:2], torch.zeros(1, dtype=torch.int64), *numbers[2:]))


def test_the_ends_of_the_range_never_choose_a_token_of_no_weight() -> None:
    logits = torch.full((1, 640), -torch.inf)
    logits[0, [3, 128, 261]] = torch.tensor([0.1, 0.7, 1e-30]).log()
    assert [drawn(logits, share) for share in (0.0, 1 - 2**-53)] == [3, 128]
    # In order of likelihood.
    assert [drawn(logits, share, 1 - 2**-53) for share in (0.0, 0.874, 0.876, 1 - 2**-53)] == [128, 128, 3, 3]


def test_a_rare_token_behind_a_great_mass_keeps_its_share() -> None:
    """In float32 a weight of 1e-4 would vanish behind a mass of 128,000."""
    logits = torch.full((1, 128_128), 0.0)
    logits[:, 128_000:] = -torch.inf
    logits[:, -1] = math.log(1e-4)
    border = 1 - 1e-4 / (128_000 + 1e-4)
    assert drawn(logits, border - 1e-14) == 127_999
    assert drawn(logits, border + 1e-14) == 128_127
