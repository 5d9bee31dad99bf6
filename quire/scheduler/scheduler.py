"""Continuous batching: each step, known tokens that are not yet computed, under one budget.

There is no prefill phase and no decode phase. A fresh prompt, the next chunk of a long one, a single new token and the
recomputation after a preemption are the same arithmetic: `num_known - num_computed`. Running sequences come first, then
waiting ones; both in one order (priority, then arrival), so a preempted sequence is also the first to come back.

`schedule` plans a step and at once counts its tokens as computed; `update` brings the drawn tokens when they are there.
Between the two, further steps may be planned (their unknown tokens are placeholders).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from quire.errors import InvalidRequest
from quire.request import EngineRequest
from quire.scheduler.adapters import Places
from quire.scheduler.blocks import BlockPool
from quire.scheduler.limits import Limits
from quire.scheduler.sequence import Group, Sequence
from quire.scheduler.speculator import SpeculationCounters, Speculator
from quire.scheduler.step import Chunk, Step
from quire.scheduler.tables import Tables


@dataclass
class Counters:
    """Totals since the start; tokens for the prefix cache."""

    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


class Scheduler:
    """Plans steps over a pool of blocks. root_of: where a request's prefix keys begin (model, adapter, salt)."""

    def __init__(self, limits: Limits, pool: BlockPool, root_of: Callable[[EngineRequest], bytes]) -> None:
        self.limits = limits
        self.pool = pool
        self.counters = Counters()
        self._root_of = root_of
        self._tables = Tables(limits, pool)
        self._places = Places()
        self._speculator = Speculator(limits.speculation, self._tables) if limits.speculation else None
        self._groups: dict[str, Group] = {}
        self._sequences: dict[int, Sequence] = {}
        self._running: list[Sequence] = []
        self._waiting: list[Sequence] = []
        self._next_id = 0
        self._arrivals = 0
        self._steps = 0

    # -- what the engine asks -----------------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def usage(self) -> float:
        """Share of the blocks that sequences hold."""
        return self.pool.num_held / self.pool.num_blocks

    @property
    def speculated(self) -> SpeculationCounters:
        """What became of drafts so far."""
        return self._speculator.counters if self._speculator else SpeculationCounters()

    def has_work(self) -> bool:
        return bool(self._sequences)

    def backlog(self) -> int:
        """Known tokens that are still to be computed."""
        return sum(sequence.num_wanted for sequence in self._sequences.values())

    def blocks_at_full_length(self) -> int:
        """Blocks that all present sequences would hold together if each grew to its longest."""
        return sum(self._tables.blocks_for(sequence.max_length) for sequence in self._sequences.values())

    def adapters(self) -> tuple[set[str], set[str]]:
        """Names of the adapters of running sequences, and of those that wait."""
        return _names(self._running), _names(self._waiting)

    def sequence(self, sequence: int) -> Sequence | None:
        return self._sequences.get(sequence)

    def sequences_of(self, request_id: str) -> list[Sequence]:
        group = self._groups.get(request_id)
        return list(group.sequences.values()) if group else []

    # -- requests come and go -----------------------------------------------------------------------------------------

    def check(self, request: EngineRequest) -> None:
        """Raise InvalidRequest if the request can never run."""
        if request.request_id in self._groups:
            raise InvalidRequest(f"request_id {request.request_id!r} is already in use.", parameter="request_id")
        longest = self._longest(request)
        if self._tables.blocks_for(longest) > self.pool.num_blocks:
            raise InvalidRequest(
                f"{longest} tokens need {self._tables.blocks_for(longest)} KV blocks, there are {self.pool.num_blocks}.",
                parameter="max_tokens",
                value=longest,
            )

    def add(self, request: EngineRequest) -> Sequence:
        """Queue a request; returns its first sequence. Raises InvalidRequest if it can never run."""
        self.check(request)
        priority = request.priority if self.limits.policy == "priority" else 0
        group = Group(request, self._arrivals, priority, self._root_of(request), to_fork=request.params.n - 1)
        self._arrivals += 1
        self._groups[request.request_id] = group
        sequence = self._new_sequence(group, 0, list(request.prompt_token_ids), self._longest(request))
        insort(self._waiting, sequence, key=_order)
        return sequence

    def abort(self, request_id: str) -> None:
        """Forget a request in whatever state it is; unknown ids are passed over."""
        for sequence in self.sequences_of(request_id):
            self._drop(sequence)
        self._groups.pop(request_id, None)

    def finish(self, sequence: int) -> None:
        """The sequence has its last token; its blocks are free for others (full ones stay findable)."""
        found = self._sequences.get(sequence)
        if found is None:
            return
        self._drop(found)
        if not found.group.sequences:
            self._groups.pop(found.group.request.request_id, None)

    def branch(self, request_id: str, choices: list[tuple[int, int]]) -> list[Sequence]:
        """Replace a request's sequences by one child for each (parent, token) of `choices`, sharing the parent's blocks.

        This is how beams move on. Parents without a child are dropped; the order of `choices` becomes the order of the group.
        """
        group = self._groups[request_id]
        parents = list(group.sequences.values())
        children = []
        for index, (parent_id, token) in enumerate(choices):
            parent = group.sequences[parent_id]
            child = self._new_sequence(group, index, [*parent.tokens, token], parent.max_length)
            children.append((child, parent))
        for child, parent in children:
            self._tables.share(parent, child)
        for parent in parents:
            self._drop(parent)
        # Children that share a parent's blocks go on running while there is room; the others wait their turn.
        for child, _ in children:
            self._enter(child)
        return [child for child, _ in children]

    def forget_prefixes(self) -> None:
        """Nothing computed so far will be reused (new weights, or a step that failed)."""
        self._tables.forget(self._sequences.values())

    # -- one step -----------------------------------------------------------------------------------------------------

    def schedule(self) -> Step | None:
        """The next step, or None if there is nothing to compute."""
        plan = _Plan(self.limits.max_num_batched_tokens)
        self._make_way(plan)
        for sequence in list(self._running):
            if plan.budget == 0:
                break
            if sequence.running:  # and not preempted by one before it
                self._plan_running(sequence, plan)
        if not plan.short:
            self._admit(plan)
        if not plan.chunks:
            self._clear_idle(plan)
            self._admit(plan)
        if not plan.chunks:
            return None
        if self._speculator and not plan.preempted:
            used = self.limits.max_num_batched_tokens - plan.budget
            self._speculator.extend(plan.chunks, self._sequences, used, plan.budget, plan.copies)
        self._steps += 1
        return Step(self._steps, tuple(plan.chunks), tuple(plan.copies), tuple(plan.preempted))

    def update(self, step: Step, drawn: Mapping[int, Tokens[int]]) -> list[Sequence]:
        """The tokens that `step` drew, by sequence: one, or as many as its draft made good. Returns the sequences that have
        grown; those gone since are passed over."""
        grown = []
        for chunk in step.chunks:
            for number in chunk.draws:
                sequence = self._sequences.get(number)
                if sequence is None or number not in drawn:
                    continue
                sequence.tokens += drawn[number]
                sequence.num_pending -= 1
                grown.append(sequence)
                if chunk.drafts:
                    self._speculator.settle(sequence, chunk, len(drawn[number]))
                self._tables.register(sequence)
        return grown

    def _plan_running(self, sequence: Sequence, plan: _Plan) -> None:
        count = self._chunk_size(sequence, plan.budget)
        if count == 0:
            return
        while not self._tables.reserve(sequence, count, plan.copies):
            victim, plan.short = self._running[-1], True
            self._preempt(victim, plan)
            if victim is sequence:
                return
        self._plan_chunk(sequence, count, plan)

    def _admit(self, plan: _Plan) -> None:
        promised = self._promised()
        most = self.limits.max_num_batched_tokens
        enough = self.limits.enough_tokens or most
        while plan.budget > 0 and most - plan.budget < enough and (sequence := self._first_waiting()) is not None:
            found = self._room_for(sequence, promised)
            if found is None:
                break
            self._start(sequence, found)
            count = self._chunk_size(sequence, plan.budget)
            reserved = self._tables.reserve(sequence, count, plan.copies)
            assert reserved, "a sequence was let in without room"
            self._plan_chunk(sequence, count, plan)
            promised += self._tables.promised(sequence)

    def _make_way(self, plan: _Plan) -> None:
        """By priority: waiting sequences that this step could compute go before running ones of less priority, which give
        way where both cannot run."""
        if self.limits.policy != "priority":
            return
        self._free_place(plan)
        while self._running and (head := self._first_waiting()) is not None:
            priority = head.group.priority
            ahead = sum(sequence.num_wanted for sequence in self._running if sequence.group.priority <= priority)
            if self._running[-1].group.priority <= priority or ahead >= plan.budget:
                return
            found = self._room_for(head, self._promised())
            if found is None:
                self._preempt(self._running[-1], plan)
            else:
                self._start(head, found)

    def _free_place(self, plan: _Plan) -> None:
        """By priority: where the first that waits lacks nothing but its adapter's place, the sequences of one adapter give way
        if all of them have less priority."""
        head = self._places.first_blocked(self._waiting, self.limits.max_loras)
        if head is None:
            return
        adapter = self._places.to_free(self._running, head.group.priority)
        if adapter is not None:
            for sequence in reversed(self._running[:]):
                if sequence.adapter == adapter:
                    self._preempt(sequence, plan)

    def _clear_idle(self, plan: _Plan) -> None:
        """Nothing can be computed but what cannot enter: beams that only wait for their siblings give way, last first."""
        if not any(sequence.num_wanted for sequence in self._waiting):
            return
        for sequence in reversed(self._running[:]):
            head = self._first_waiting()
            if head is not None and self._room_for(head, self._promised()) is not None:
                return
            if sequence.offered:
                self._preempt(sequence, plan)

    def _first_waiting(self) -> Sequence | None:
        """The next to enter."""
        return self._places.first(self._waiting, self.limits.max_loras)

    def _room_for(self, sequence: Sequence, promised: int) -> list[int] | None:
        """The blocks to begin with, None if the sequence cannot enter. There must be room for all that is known of it, and of
        those that run: a prompt that is begun but cannot be finished would be computed twice."""
        if len(self._running) >= self.limits.max_num_seqs:
            return None
        found = self._tables.find(sequence)
        return found if self._tables.cost_of_entry(sequence, found) + promised <= self.pool.num_free else None

    def _promised(self) -> int:
        return sum(map(self._tables.promised, self._running)) if self._waiting else 0

    def _start(self, sequence: Sequence, found: list[int]) -> None:
        _remove(self._waiting, sequence)
        self._places.passed_by(sequence, self._waiting)
        self._tables.begin(sequence, found)
        self._run(sequence)
        if sequence.num_cached < 0:
            sequence.num_cached = sequence.num_computed
            if self._tables.reads_prefixes(sequence):
                self.counters.prefix_queries += sequence.num_known
                self.counters.prefix_hits += sequence.num_computed

    def _plan_chunk(self, sequence: Sequence, count: int, plan: _Plan) -> None:
        """Plan `count` tokens, whose blocks are reserved."""
        start = sequence.num_computed
        chunk_tokens = sequence.slice(start, count)
        sequence.num_computed += count
        plan.budget -= count
        draws: tuple[int, ...] = ()
        if sequence.num_computed == sequence.num_known:
            draws = (sequence.id,)
            if sequence.group.request.beam is not None:
                sequence.offered = True
            else:
                sequence.num_pending += 1
                if sequence.group.to_fork:
                    draws += self._fork(sequence)
        self._tables.register(sequence)
        plan.chunks.append(Chunk(sequence.id, start, chunk_tokens, sequence.blocks, draws, adapter=sequence.adapter))

    def _chunk_size(self, sequence: Sequence, budget: int) -> int:
        wanted, threshold = sequence.num_wanted, self.limits.long_prefill_token_threshold
        return wanted if wanted <= 1 else min(wanted, budget, threshold or budget)

    # -- samples of one prompt ----------------------------------------------------------------------------------------

    def _fork(self, first: Sequence) -> tuple[int, ...]:
        """The prompt is computed: its other samples part from it, sharing every block until they write."""
        group, children = first.group, []
        for index in range(1, group.to_fork + 1):
            child = self._new_sequence(group, index, list(first.tokens), first.max_length)
            child.num_pending = 1
            self._tables.share(first, child)
            self._enter(child)
            children.append(child.id)
        group.to_fork = 0
        return tuple(children)

    def _enter(self, sequence: Sequence) -> None:
        """Run at once if there is a place, else wait without blocks (their content may still be found)."""
        if sequence.blocks and len(self._running) < self.limits.max_num_seqs:
            self._run(sequence)
            return
        self._tables.give_back(sequence)
        insort(self._waiting, sequence, key=_order)

    def _run(self, sequence: Sequence) -> None:
        insort(self._running, sequence, key=_order)
        sequence.running = True
        self._places.enter(sequence)

    def _stop(self, sequence: Sequence) -> None:
        _remove(self._running, sequence)
        sequence.running = False
        self._places.leave(sequence)

    def _preempt(self, sequence: Sequence, plan: _Plan) -> None:
        self._stop(sequence)
        self._tables.give_back(sequence)
        sequence.num_preemptions += 1
        self.counters.preemptions += 1
        plan.preempted.append(sequence.id)
        insort(self._waiting, sequence, key=_order)

    # -- sequences ----------------------------------------------------------------------------------------------------

    def _longest(self, request: EngineRequest) -> int:
        prompt, most = len(request.prompt_token_ids), request.params.max_tokens
        limit = self.limits.max_model_len
        return max(prompt, limit if most is None else min(limit, prompt + most))

    def _new_sequence(self, group: Group, index: int, tokens: list[int], max_length: int) -> Sequence:
        sequence = Sequence(
            self._next_id, group, index, tokens, prompt_length=len(group.request.prompt_token_ids), max_length=max_length
        )
        self._next_id += 1
        self._sequences[sequence.id] = group.sequences[sequence.id] = sequence
        return sequence

    def _drop(self, sequence: Sequence) -> None:
        if sequence.running:
            self._stop(sequence)
        else:
            _remove(self._waiting, sequence)
        self._tables.give_back(sequence)
        del self._sequences[sequence.id], sequence.group.sequences[sequence.id]


class _Plan:
    """A step in the making."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        # Blocks ran out: nobody new is let in, least of all a sample that parted in this step and whose token it draws.
        self.short = False
        self.chunks: list[Chunk] = []
        self.copies: list[tuple[int, int]] = []
        self.preempted: list[int] = []


def _names(sequences: list[Sequence]) -> set[str]:
    requests = (sequence.group.request for sequence in sequences)
    return {request.lora_request.lora_name for request in requests if request.lora_request is not None}


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.order


def _remove(queue: list[Sequence], sequence: Sequence) -> None:
    place = bisect_left(queue, sequence.order, key=_order)
    assert queue[place] is sequence
    del queue[place]
