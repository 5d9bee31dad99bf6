"""Dropout of an adapter's input while it trains: which numbers fall out follows from a key, so that a resumed run drops the
same ones, and a layer that is computed a second time for its gradients sees the same input.

Row k of a slot gets the same mask whatever other slots are in the batch.
"""

from __future__ import annotations

import hashlib

import numpy
import torch
from torch import Tensor


class Dropout:
    """One slot's: what the trainer sets between two passes. key None: nothing falls out (evaluation, serving)."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.key: str | None = None

    @property
    def active(self) -> bool:
        return self.key is not None and self.rate > 0

    def mask(self, module: str, rows: int, columns: int) -> Tensor:
        """[rows, columns] float32: 0 with the given probability, 1 / (1 - rate) otherwise."""
        digest = hashlib.sha256(f"{self.key}|{module}".encode()).digest()
        source = numpy.random.Philox(key=int.from_bytes(digest[:16], "little"))
        count = rows * columns
        numbers = source.random_raw((count + 3) // 4).view(numpy.uint16)[:count]
        kept = torch.from_numpy((numbers >= round(self.rate * 65536)).reshape(rows, columns))
        return kept.float() / (1 - self.rate)
