"""The stages of a server's life: starting -> ready -> draining -> stopped. No stage is ever entered twice.

Knows neither signals nor sockets: the server says when, this room says what is allowed.
"""

from __future__ import annotations

from enum import StrEnum

from quire.errors import Unavailable


class Stage(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


_ORDER = list(Stage)


class Lifecycle:
    """Where the server stands and whether new requests are taken."""

    def __init__(self) -> None:
        self.stage = Stage.STARTING
        self._door_closed = False

    def advance(self, stage: Stage) -> bool:
        """Go on to `stage`; False if it is reached or passed already."""
        if _ORDER.index(stage) <= _ORDER.index(self.stage):
            return False
        self.stage = stage
        return True

    def close_door(self) -> None:
        """From now on nothing new; until then a draining server still takes requests, for load balancers that lag."""
        self._door_closed = True

    def check_open(self) -> None:
        """Raise Unavailable unless a new request may start."""
        if self.stage is Stage.STARTING:
            raise Unavailable("the model is still loading.", retry_after=5.0)
        if self._door_closed or self.stage is Stage.STOPPED:
            raise Unavailable("the server is shutting down.", retry_after=10.0)
