"""The block view of a row against the plain operations that it replaces."""

from __future__ import annotations

import pytest
import torch

from quire.ops.blocks import BLOCK, best, largest, pad_to_blocks


def tied_rows(rows: int, width: int) -> torch.Tensor:
    """Rows of few distinct values, so that nearly everything ties."""
    return torch.randint(-3, 4, (rows, width), generator=torch.Generator().manual_seed(width)).float()


@pytest.mark.parametrize("width", [1, 8, 127, 128, 129, 3000, 40_000])
@pytest.mark.parametrize("ties", [True, False])
def test_best_and_largest_are_those_of_a_stable_sort(width: int, ties: bool) -> None:
    rows = tied_rows(6, width)
    if not ties:
        rows += torch.rand(6, width, generator=torch.Generator().manual_seed(0))
    padded = pad_to_blocks(rows)
    values, ids = rows.sort(dim=-1, descending=True, stable=True)
    peak, token = best(padded)
    assert torch.equal(peak, values[:, 0])
    assert torch.equal(token, ids[:, 0])
    for count in {1, 2, 5, 20, 100, 1000, width}:
        if count <= width:
            assert torch.equal(largest(padded, count)[0], values[:, :count])
            assert torch.equal(largest(padded, count)[1], ids[:, :count])


def test_padding_is_of_no_weight_and_no_copy_where_none_is_needed() -> None:
    assert pad_to_blocks(torch.zeros(2, 130)).exp().sum(-1).tolist() == [130, 130]
    whole = torch.zeros(2, 2 * BLOCK)
    assert pad_to_blocks(whole) is whole


def test_nan_counts_as_largest() -> None:
    rows = torch.zeros(3, 300)
    rows[1, 200] = torch.nan
    assert best(pad_to_blocks(rows))[0].isnan().tolist() == [False, True, False]
