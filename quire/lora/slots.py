"""The slots of a model: which adapter's rows go through which numbers. Sets the sockets of linears and embeddings.

To be used between two steps, from the thread that runs the model. Serving and training slots come from the same object.
Knows no names of adapters and no limit on their number.
"""

from __future__ import annotations

import heapq

from torch import Tensor

from quire import ops
from quire.layers.embedding import Embedding
from quire.layers.linear import Linear
from quire.lora.parts import Adapter
from quire.models.decoder import CausalLM
from quire.ops.weights import LoraWeight


class PlainSocket:
    """A linear whose adapters are A and B alone: one operation."""

    def __init__(self, weights: tuple[LoraWeight | None, ...]) -> None:
        self.table = ops.lora_table(weights)

    def __call__(self, x: Tensor, y: Tensor, slots: Tensor) -> Tensor:
        return ops.lora(x, y, slots, self.table)


class Slots:
    """Numbers for adapters, smallest free one first, and the adapters placed in them."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self._modules = {name: module for name, module in model.named_modules() if isinstance(module, (Linear, Embedding))}
        self._free: list[int] = []
        self._placed: list[Adapter | None] = []

    def take(self) -> int:
        """A slot that nobody has; its rows are as the base until something is placed."""
        if self._free:
            return heapq.heappop(self._free)
        self._placed.append(None)
        return len(self._placed) - 1

    def place(self, slot: int, adapter: Adapter) -> None:
        """Let rows of `slot` go through `adapter`, in place of what was there. Its tensors are not copied on the CPU."""
        self._set(slot, adapter.on(self.device))

    def give_back(self, slot: int) -> None:
        """The slot is free again."""
        self._set(slot, None)
        heapq.heappush(self._free, slot)

    def _set(self, slot: int, adapter: Adapter | None) -> None:
        assert slot < len(self._placed), f"slot {slot} was not taken"
        assert slot not in self._free, f"slot {slot} was given back"
        before, self._placed[slot] = self._placed[slot], adapter
        touched = {name for one in (before, adapter) if one is not None for name in one.parts}
        for name in sorted(touched):
            self._modules[name].adapter = self._socket(name)

    def _socket(self, name: str) -> PlainSocket | None:
        parts = [None if adapter is None else adapter.parts.get(name) for adapter in self._placed]
        if all(part is None for part in parts):
            return None
        return PlainSocket(tuple(None if part is None else LoraWeight(part.a, part.b, part.scale) for part in parts))
