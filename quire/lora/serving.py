"""The slots that requests' adapters are in: at most `max_loras`, the least recently used one giving way.

To be used between two steps, from the thread that runs the model. What has left memory leaves its slot before the next step,
so that nothing is kept alive by a slot alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from quire.lora.manager import AdapterManager
from quire.lora.slots import Slots


class ServingSlots:
    """Digests of adapters and the slots they are in."""

    def __init__(self, slots: Slots, manager: AdapterManager, most: int) -> None:
        self.manager = manager
        self._slots, self._most = slots, most
        self._slot_of: OrderedDict[str, int] = OrderedDict()

    def of(self, digests: Iterable[str]) -> Mapping[str, int]:
        """The slots of a step's adapters, all of which are leased. -1 stands for the base alone."""
        wanted = {digest for digest in digests if digest}
        assert len(wanted) <= self._most, "more adapters in a step than slots"
        self.sweep()
        for digest in wanted & set(self._slot_of):
            self._slot_of.move_to_end(digest)
        for digest in sorted(wanted - set(self._slot_of)):
            slot = self._take(wanted)
            self._slots.place(slot, self.manager.leased(digest))
            self._slot_of[digest] = slot
        return {"": -1, **{digest: self._slot_of[digest] for digest in wanted}}

    def sweep(self) -> None:
        """Empty the slots of adapters that are no longer in memory."""
        for digest in [digest for digest in self._slot_of if not self.manager.in_memory(digest)]:
            self._slots.give_back(self._slot_of.pop(digest))

    @property
    def version(self) -> int:
        """Of what is in the slots (`Slots.version`)."""
        return self._slots.version

    @property
    def num_used(self) -> int:
        return len(self._slot_of)

    def _take(self, wanted: set[str]) -> int:
        if len(self._slot_of) < self._most:
            return self._slots.take()
        oldest = next(digest for digest in self._slot_of if digest not in wanted)
        return self._slot_of.pop(oldest)
