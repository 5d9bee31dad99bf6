"""One sequence of tokens on its way through the engine, and the group of sequences that one request began."""

from __future__ import annotations

from dataclasses import dataclass, field

from quire.request import EngineRequest
from quire.scheduler.step import PLACEHOLDER


@dataclass(eq=False)
class Sequence:
    """Known tokens and how many of them are computed.

    tokens: prompt and output as far as they are on the host. num_pending: tokens that steps in flight will add.
    num_computed: tokens whose keys and values are in `blocks` (or will be, once the steps in flight have run).
    keys: prefix keys of the full blocks so far, num_registered of which others can find.
    max_length: no token is added beyond it.
    """

    id: int
    group: Group
    index: int
    tokens: list[int]
    prompt_length: int
    max_length: int
    num_pending: int = 0
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    num_registered: int = 0
    running: bool = False
    num_preemptions: int = 0
    num_cached: int = -1
    """Tokens found in the prefix cache when the sequence first ran; -1 before."""

    @property
    def num_known(self) -> int:
        return len(self.tokens) + self.num_pending

    @property
    def num_wanted(self) -> int:
        """Known tokens that are not computed; none for a sequence that pending tokens have brought to its full length."""
        return 0 if self.num_known >= self.max_length and self.num_pending else self.num_known - self.num_computed

    @property
    def order(self) -> tuple[int, int, int]:
        """First come, first served - within a priority."""
        return (self.group.priority, self.group.arrival, self.id)

    def slice(self, start: int, count: int) -> tuple[int, ...]:
        """`count` known tokens from `start`, PLACEHOLDER for those in flight."""
        known = self.tokens[start : start + count]
        return tuple(known) + (PLACEHOLDER,) * (count - len(known))


@dataclass(eq=False)
class Group:
    """The sequences of one request. arrival: its number in order of arrival. root: where its prefix keys begin."""

    request: EngineRequest
    arrival: int
    priority: int
    root: bytes
    sequences: dict[int, Sequence] = field(default_factory=dict)
    to_fork: int = 0
    """Samples that part from the first one when the prompt is computed."""
