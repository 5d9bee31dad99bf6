"""The slots of a model: which adapter's rows go through which numbers. Sets the sockets of linears, embeddings, norms.

To be used between two steps, from the thread that runs the model. Serving and training slots come from the same object.
Knows no names of adapters and no limit on their number.
"""

from __future__ import annotations

import heapq
from weakref import WeakKeyDictionary

from quire.lora.base import kept_modules
from quire.lora.dropout import Dropout
from quire.lora.parts import Adapter
from quire.lora.sockets import Entry, RarePart, socket
from quire.models.decoder import CausalLM


class Slots:
    """Numbers for adapters, smallest free one first, and the adapters placed in them."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self._modules = kept_modules(model)
        self.version = 0  # of what is placed: as long as it stands, so do the tables of the sockets
        self._free: list[int] = []
        self._placed: list[dict[str, Entry]] = []  # by slot and module
        self._dropouts: list[Dropout] = []
        self._prepared: WeakKeyDictionary[Adapter, tuple[Adapter, dict[str, RarePart]]] = WeakKeyDictionary()

    def take(self) -> int:
        """A slot that nobody has; its rows are as the base until something is placed."""
        if self._free:
            return heapq.heappop(self._free)
        self._placed.append({})
        self._dropouts.append(Dropout(0.0))
        return len(self._placed) - 1

    def prepare(self, adapter: Adapter) -> None:
        """Compute ahead what placing a frozen adapter needs (DoRA's norms, packed weights), in whatever thread loads it."""
        if adapter not in self._prepared:
            there = adapter.on(self.device)
            rare = {name: RarePart(self.model, name, part) for name, part in there.parts.items() if not part.plain}
            self._prepared[adapter] = there, rare

    def place(self, slot: int, adapter: Adapter) -> None:
        """Let rows of `slot` go through `adapter`, in place of what was there. Its tensors are not copied on the CPU."""
        self.prepare(adapter)
        there, rare = self._prepared[adapter]
        dropout = Dropout(there.config.lora_dropout if there.trainable else 0.0)
        self._set(slot, {name: Entry(slot, part, rare.get(name), dropout) for name, part in there.parts.items()})
        self._dropouts[slot] = dropout

    def drop(self, slot: int, key: str | None) -> None:
        """From now on the inputs of the slot's A fall out with the adapter's `lora_dropout`; which ones follows from `key`
        and the module. To be set anew for each pass (a seed and the number of the step, say); None: nothing falls out."""
        self._dropouts[slot].key = key

    def give_back(self, slot: int) -> None:
        """The slot is free again."""
        self._set(slot, {})
        heapq.heappush(self._free, slot)

    def _set(self, slot: int, entries: dict[str, Entry]) -> None:
        assert slot < len(self._placed), f"slot {slot} was not taken"
        assert slot not in self._free, f"slot {slot} was given back"
        self.version += 1
        before, self._placed[slot] = self._placed[slot], entries
        for name in before.keys() | entries.keys():
            module = self._modules[name]
            module.adapter = socket(module, name, [placed[name] for placed in self._placed if name in placed])
