"""Requests whose adapter is not in memory yet: they wait here, before the scheduler, while others go on.

Holds each request's lease on its adapter from its arrival to its end, so that what a stream began with is what it ends with.
"""

from __future__ import annotations

from quire.lora.manager import AdapterManager, Lease
from quire.request import EngineRequest

# While nothing can be computed: how long to wait for an adapter before other calls are looked at again.
WAIT_SECONDS = 0.01


class Arrivals:
    """The adapters of all requests in progress."""

    def __init__(self, manager: AdapterManager) -> None:
        self._manager = manager
        self._leases: dict[str, Lease] = {}
        self._waiting: dict[str, EngineRequest] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: EngineRequest) -> None:
        """Ask for the request's adapter."""
        lease = self._manager.lease(request.lora_request.lora_name, request.adapter)
        self._leases[request.request_id], self._waiting[request.request_id] = lease, request

    def settled(self) -> list[tuple[EngineRequest, Lease]]:
        """Those that need not wait any longer: their adapter is in memory, or cannot be had."""
        ready = [request for id, request in self._waiting.items() if self._leases[id].settled]
        for request in ready:
            del self._waiting[request.request_id]
        return [(request, self._leases[request.request_id]) for request in ready]

    def release(self, request_id: str) -> None:
        """The request has ended; nothing happens if it had no adapter."""
        self._waiting.pop(request_id, None)
        lease = self._leases.pop(request_id, None)
        if lease is not None:
            self._manager.give_back(lease)

    def names(self) -> set[str]:
        """Names of the adapters that are waited for."""
        return {request.lora_request.lora_name for request in self._waiting.values()}

    def wait(self) -> None:
        """Until an adapter has come or gone, at most a moment."""
        self._manager.wait(WAIT_SECONDS)
