from __future__ import annotations

import pytest
import torch

from quire.ops.room import HUGE_PAGE, uninitialized


@pytest.mark.parametrize(("shape", "alignment"), [((3, 5), 64), ((3, HUGE_PAGE), HUGE_PAGE)])
def test_large_tensors_begin_at_a_huge_page(shape: tuple[int, ...], alignment: int) -> None:
    room = uninitialized(shape, torch.bfloat16)
    assert (room.shape, room.dtype, room.is_contiguous()) == (shape, torch.bfloat16, True)
    assert room.data_ptr() % alignment == 0
    room.fill_(1)
    assert bool((room == 1).all())
