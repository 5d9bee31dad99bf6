"""Keeps the allocator from holding on to what loading has finished with.

glibc takes large blocks from the system and gives them back when freed, but raises the size from which it does so up to the
largest block that was freed (at most 32 MiB). From then on tensors of some megabytes come and go inside the heap, where what
was kept in between pins the gaps: 60 MiB beside 149 MiB of int8 weights.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
WHILE_LOADING = 1 << 20
# Where glibc's own rule ends, so that the buffers of steps are kept as they would be without us.
AFTERWARDS = 32 << 20


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
    mallopt(_MMAP_THRESHOLD, WHILE_LOADING)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, AFTERWARDS)
        mallopt(_TRIM_THRESHOLD, 2 * AFTERWARDS)
        trim(0)
