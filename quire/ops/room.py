"""Memory for what is read again and again: large tensors in huge pages, where the system has them.

A token's keys and values lie kilobytes from the next one's: in small pages every one of them is looked up in the page table.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21
MADV_HUGEPAGE = 14


def uninitialized(shape: int | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of that shape, aligned to 64 bytes, which takes memory when it is first written."""
    shape = (shape,) if isinstance(shape, int) else shape
    count = math.prod(shape) * dtype.itemsize
    if count < HUGE_PAGE:
        return torch.empty(shape, dtype=dtype)  # torch aligns to 64
    room = torch.empty(count + HUGE_PAGE, dtype=torch.uint8)
    data = room[-room.data_ptr() % HUGE_PAGE :][:count]
    if _advise is not None:
        _advise(data.data_ptr(), count, MADV_HUGEPAGE)
    return data.view(dtype).view(shape)


def _madvise() -> Callable[[int, int, int], int] | None:
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return function


_advise = _madvise()
