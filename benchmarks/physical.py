"""What the machine can do at this moment: reading memory, and multiplying matrices."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

READ_BYTES = 1 << 29
ROWS, INPUTS, OUTPUTS = 512, 2048, 4096


def read_bandwidth() -> float:
    """Bytes a second that all threads together read from memory: the sum of a tensor that no cache holds."""
    tensor = torch.ones(READ_BYTES // 4)
    return READ_BYTES / _seconds(tensor.sum)


def multiply_rate(dtype: torch.dtype) -> float:
    """Floating point operations a second of a large matrix product."""
    left, right = torch.randn(ROWS, INPUTS).to(dtype), torch.randn(OUTPUTS, INPUTS).to(dtype).t()
    return 2 * ROWS * INPUTS * OUTPUTS / _seconds(lambda: left @ right)


def _seconds(action: Callable[[], object], times: int = 7) -> float:
    action()
    measured = []
    for _ in range(times):
        begin = time.perf_counter()
        action()
        measured.append(time.perf_counter() - begin)
    return statistics.median(measured)
