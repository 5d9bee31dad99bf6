"""Dropout on what goes into the adapters, from counters: a layer that is computed twice drops the same numbers, and so does
a run that was resumed, or that shares its batch with others. Serving never sees it: sockets are back after each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quire.lora.new import generator


@dataclass(frozen=True)
class _Dropping:
    """A socket whose adapter sees the rows of `slot` with some numbers left out, the others larger."""

    socket: Callable[[Tensor, Tensor, Tensor], Tensor]
    slot: int
    share: float
    source: torch.Generator

    def __call__(self, x: Tensor, y: Tensor, slots: Tensor) -> Tensor:
        rows = (slots == self.slot).nonzero()[:, 0]
        kept = torch.rand(len(rows), x.shape[1], generator=self.source) >= self.share
        factor = torch.ones_like(x)
        factor[rows] = (kept / (1 - self.share)).to(x.dtype)
        return self.socket(x * factor, y, slots)


@contextmanager
def dropped(modules: Sequence[tuple[str, Any]], slot: int, share: float, key: tuple[int, ...]) -> Iterator[Mapping[str, Any]]:
    """Within, the adapters of these (name, module) pairs drop inputs of `slot`; key: seed, step and micro batch."""
    before = {name: module.adapter for name, module in modules if module.adapter is not None}
    seed, *counters = key
    for name, module in modules:
        if name in before:
            source = generator(seed, f"dropout|{counters}|{name}")
            module.adapter = _Dropping(before[name], slot, share, source)
    try:
        yield before
    finally:
        for name, module in modules:
            if name in before:
                module.adapter = before[name]
