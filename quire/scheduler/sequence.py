"""One sequence of tokens on its way through the engine, and the group of sequences that one request began."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from quire.request import EngineRequest
from quire.scheduler.lookup import Lookup
from quire.scheduler.step import PLACEHOLDER


@dataclass(eq=False, slots=True)
class Sequence:
    """Known tokens and how many of them are computed.

    tokens: prompt and output as far as they are on the host. num_pending: tokens that steps in flight will add.
    num_computed: tokens whose keys and values are in `blocks` (or will be, once the steps in flight have run).
    blocks: replaced, never changed, when the table grows.
    keys: prefix keys of the full blocks so far, num_registered of which others can find.
    max_length: no token is added beyond it. offered: a beam whose next tokens are drawn; it has no more to compute until its
    group branches. num_drafts: guessed tokens among the computed ones, in a step in flight; until it is known which of them are
    right, the sequence has no more to compute. order: first come, first served - within a priority.
    """

    id: int
    group: Group
    index: int
    tokens: list[int]
    prompt_length: int
    max_length: int
    num_pending: int = 0
    num_computed: int = 0
    blocks: array[int] = field(default_factory=lambda: array("q"))
    keys: list[bytes] = field(default_factory=list)
    num_registered: int = 0
    running: bool = False
    offered: bool = False
    num_drafts: int = 0
    lookup: Lookup | None = None
    """Where drafts come from, made for the first one."""
    num_preemptions: int = 0
    num_cached: int = -1
    """Tokens found in the prefix cache when the sequence first ran; -1 before."""
    num_passed: int = 0
    """Later sequences that entered while this one waited for its adapter's place."""
    order: tuple[int, int, int] = field(init=False)
    adapter: str = field(init=False)
    """Digest of the adapter that the tokens go through; empty for the base alone."""

    def __post_init__(self) -> None:
        self.order = (self.group.priority, self.group.arrival, self.id)
        self.adapter = self.group.request.adapter

    @property
    def num_known(self) -> int:
        return len(self.tokens) + self.num_pending

    @property
    def num_wanted(self) -> int:
        """Known tokens that are not computed; none for a sequence that pending tokens have brought to its full length, or
        that waits for what becomes of its draft."""
        known = len(self.tokens) + self.num_pending
        if self.offered or self.num_drafts or (self.num_pending and known >= self.max_length):
            return 0
        return known - self.num_computed

    def slice(self, start: int, count: int) -> tuple[int, ...]:
        """`count` known tokens from `start`, PLACEHOLDER for those in flight."""
        known = tuple(self.tokens[start : start + count])
        if len(known) == count:
            return known
        return known + (PLACEHOLDER,) * (count - len(known))


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
