"""Keeps the allocator from holding on to what loading has finished with.

glibc takes large blocks from the system and gives them back when freed, but raises the size from which it does so up to the
largest block that was freed (at most 32 MiB). From then on tensors of some megabytes come and go inside the heap, where what
was kept in between pins the gaps: 60 MiB beside 149 MiB of int8 weights.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of mallopt
WHILE_LOADING = 1 << 20
# The buffers of steps are kept, those above 32 MiB too, which glibc would give back each time and the system clear again for
# the next: a seventh of a prompt of 2,048 tokens.
KEPT = 256 << 20


def give_back_freed() -> None:
    """What was freed inside the heap goes back to the system; nothing happens without glibc. Takes milliseconds."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def large_blocks_given_back() -> Iterator[None]:
    """Blocks of a megabyte and more go back to the system as soon as they are freed; nothing changes without glibc."""
    library = ctypes.CDLL(None)
    mallopt, trim = getattr(library, "mallopt", None), getattr(library, "malloc_trim", None)
    if mallopt is None or trim is None:
        yield
        return
    mallopt(_MMAP_MAX, 1 << 16)
    mallopt(_MMAP_THRESHOLD, WHILE_LOADING)
    try:
        yield
    finally:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, KEPT)
        trim(0)
