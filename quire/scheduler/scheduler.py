"""Continuous batching: each step, known tokens that are not yet computed, under one budget.

There is no prefill phase and no decode phase. A fresh prompt, the next chunk of a long one, a single new token and the
recomputation after a preemption are the same arithmetic: `num_known - num_computed`. Running sequences come first, then
waiting ones; both in one order (priority, then arrival), so a preempted sequence is also the first to come back.

`schedule` plans a step and at once counts its tokens as computed; `update` brings the drawn tokens when they are there.
Between the two, further steps may be planned (their unknown tokens are placeholders).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from quire.errors import InvalidRequest
from quire.request import EngineRequest
from quire.scheduler.blocks import BlockPool
from quire.scheduler.prefix import next_key
from quire.scheduler.sequence import Group, Sequence
from quire.scheduler.step import Chunk, Step


@dataclass
class Limits:
    """Active limits; all but the block size and the pool may be changed while the engine runs."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int = 16
    long_prefill_token_threshold: int = 0
    policy: str = "fcfs"
    prefix_caching: bool = True


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

    def has_work(self) -> bool:
        return bool(self._sequences)

    def backlog(self) -> int:
        """Known tokens that are still to be computed."""
        return sum(sequence.num_wanted for sequence in self._sequences.values())

    def blocks_at_full_length(self) -> int:
        """Blocks that all present sequences would hold together if each grew to its longest."""
        return sum(self._blocks_for(sequence.max_length) for sequence in self._sequences.values())

    def sequence(self, sequence: int) -> Sequence | None:
        return self._sequences.get(sequence)

    def sequences_of(self, request_id: str) -> list[Sequence]:
        group = self._groups.get(request_id)
        return list(group.sequences.values()) if group else []

    # -- requests come and go -----------------------------------------------------------------------------------------

    def add(self, request: EngineRequest) -> Sequence:
        """Queue a request; returns its first sequence. Raises InvalidRequest if it can never run."""
        if request.request_id in self._groups:
            raise InvalidRequest(f"request_id {request.request_id!r} is already in use.", parameter="request_id")
        longest = self._longest(request)
        if self._blocks_for(longest) > self.pool.num_blocks:
            raise InvalidRequest(
                f"{longest} tokens need {self._blocks_for(longest)} KV blocks, there are {self.pool.num_blocks}.",
                parameter="max_tokens",
                value=longest,
            )
        priority = request.priority if self.limits.policy == "priority" else 0
        group = Group(request, self._arrivals, priority, self._root_of(request), to_fork=request.params.n - 1)
        self._arrivals += 1
        self._groups[request.request_id] = group
        sequence = self._new_sequence(group, 0, list(request.prompt_token_ids), longest)
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
            self._share_blocks(parent, child)
        for parent in parents:
            self._drop(parent)
        # Children that share a parent's blocks go on running while there is room; the others wait their turn.
        for child, _ in children:
            self._enter(child)
        return [child for child, _ in children]

    def forget_prefixes(self) -> None:
        """Nothing computed so far will be reused (new weights, or a step that failed)."""
        self.pool.forget()
        for sequence in self._sequences.values():
            sequence.num_registered = 0

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
        if not plan.chunks and self._waiting and self._preempt_idle(plan):
            self._admit(plan)
        if not plan.chunks:
            return None
        self._steps += 1
        return Step(self._steps, tuple(plan.chunks), tuple(plan.copies), tuple(plan.preempted))

    def update(self, step: Step, drawn: Mapping[int, int]) -> list[Sequence]:
        """The tokens that `step` drew, by sequence. Returns the sequences that have grown; those gone since are passed over."""
        grown = []
        for chunk in step.chunks:
            for number in chunk.draws:
                sequence = self._sequences.get(number)
                if sequence is None or number not in drawn:
                    continue
                sequence.tokens.append(drawn[number])
                sequence.num_pending -= 1
                grown.append(sequence)
                self._register(sequence)
        return grown

    def _plan_running(self, sequence: Sequence, plan: _Plan) -> None:
        count = self._chunk_size(sequence, plan.budget)
        if count == 0:
            return
        while self._blocks_short(sequence, count) > self.pool.num_free:
            victim, plan.short = self._running[-1], True
            self._preempt(victim, plan)
            if victim is sequence:
                return
        self._plan_chunk(sequence, count, plan)

    def _admit(self, plan: _Plan) -> None:
        while self._waiting and plan.budget > 0 and len(self._running) < self.limits.max_num_seqs:
            sequence = self._waiting[0]
            if sequence.num_wanted == 0:
                break  # its last token is in flight
            found = self._find_prefix(sequence)
            # Cached blocks that are found leave the free ones, so both must have room together, for all known tokens:
            # a prompt that is begun but cannot be finished would be computed twice.
            revived = sum(1 for block in found if self.pool.holders(block) == 0)
            if self._blocks_for(sequence.num_known) - len(found) + revived > self.pool.num_free:
                break
            self._waiting.pop(0)
            self._reuse(sequence, found)
            insort(self._running, sequence, key=_order)
            sequence.running = True
            self._plan_chunk(sequence, self._chunk_size(sequence, plan.budget), plan)

    def _make_way(self, plan: _Plan) -> None:
        """By priority: running sequences of less priority give way to a waiting one that cannot enter otherwise."""
        if self.limits.policy != "priority" or not self._waiting:
            return
        head = self._waiting[0]
        while self._running and self._running[-1].group.priority > head.group.priority:
            fits = self._blocks_for(head.num_known) <= self.pool.num_free
            if fits and len(self._running) < self.limits.max_num_seqs:
                return
            self._preempt(self._running[-1], plan)

    def _preempt_idle(self, plan: _Plan) -> bool:
        """Sequences that run but have nothing to compute (beams that wait for a sibling) give way, last first."""
        needed = self._blocks_for(self._waiting[0].num_known)
        before = len(plan.preempted)
        while self._running and (needed > self.pool.num_free or len(self._running) >= self.limits.max_num_seqs):
            if self._running[-1].num_pending:
                break
            self._preempt(self._running[-1], plan)
        return len(plan.preempted) > before

    def _plan_chunk(self, sequence: Sequence, count: int, plan: _Plan) -> None:
        start = sequence.num_computed
        self._reserve(sequence, count, plan)
        chunk_tokens = sequence.slice(start, count)
        sequence.num_computed += count
        plan.budget -= count
        draws: tuple[int, ...] = ()
        if sequence.num_computed == sequence.num_known:
            draws = (sequence.id,)
            if sequence.group.request.beam is None:
                sequence.num_pending += 1
                draws += self._fork(sequence)
        self._register(sequence)
        plan.chunks.append(Chunk(sequence.id, start, chunk_tokens, tuple(sequence.blocks), draws))

    def _chunk_size(self, sequence: Sequence, budget: int) -> int:
        threshold = self.limits.long_prefill_token_threshold
        return min(sequence.num_wanted, budget, threshold or budget)

    # -- samples of one prompt ----------------------------------------------------------------------------------------

    def _fork(self, first: Sequence) -> tuple[int, ...]:
        """The prompt is computed: its other samples part from it, sharing every block until they write."""
        group, children = first.group, []
        for index in range(1, group.to_fork + 1):
            child = self._new_sequence(group, index, list(first.tokens), first.max_length)
            child.num_pending = 1
            self._share_blocks(first, child)
            self._enter(child)
            children.append(child.id)
        group.to_fork = 0
        return tuple(children)

    def _share_blocks(self, parent: Sequence, child: Sequence) -> None:
        for block in parent.blocks:
            self.pool.share(block)
        child.blocks, child.keys, child.num_registered = list(parent.blocks), list(parent.keys), parent.num_registered
        child.num_computed, child.num_cached = parent.num_computed, parent.num_cached

    def _enter(self, sequence: Sequence) -> None:
        """Run at once if there is a place, else wait without blocks (their content may still be found)."""
        if sequence.blocks and len(self._running) < self.limits.max_num_seqs:
            sequence.running = True
            insort(self._running, sequence, key=_order)
            return
        self._give_back(sequence)
        insort(self._waiting, sequence, key=_order)

    # -- blocks -------------------------------------------------------------------------------------------------------

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.limits.block_size)

    def _blocks_short(self, sequence: Sequence, count: int) -> int:
        new = self._blocks_for(sequence.num_computed + count) - len(sequence.blocks)
        return new + (self._shared_tail(sequence) is not None)

    def _shared_tail(self, sequence: Sequence) -> int | None:
        """Index of the half-filled block that the next token goes to, if others hold it too."""
        index, offset = divmod(sequence.num_computed, self.limits.block_size)
        if offset and self.pool.holders(sequence.blocks[index]) > 1:
            return index
        return None

    def _reserve(self, sequence: Sequence, count: int, plan: _Plan) -> None:
        tail = self._shared_tail(sequence)
        if tail is not None:
            shared, own = sequence.blocks[tail], self.pool.take()
            plan.copies.append((shared, own))
            self.pool.release(shared)
            sequence.blocks[tail] = own
        while len(sequence.blocks) < self._blocks_for(sequence.num_computed + count):
            sequence.blocks.append(self.pool.take())

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """Cached blocks of the sequence's longest known prefix; at least one token is left to compute."""
        if not self.limits.prefix_caching or sequence.group.request.params.skip_reading_prefix_cache:
            return []
        self._extend_keys(sequence, len(sequence.tokens) // self.limits.block_size)
        found = []
        for key in sequence.keys[: (sequence.num_known - 1) // self.limits.block_size]:
            block = self.pool.find(key)
            if block is None:
                break
            found.append(block)
        return found

    def _reuse(self, sequence: Sequence, found: list[int]) -> None:
        for block in found:
            self.pool.share(block)
        sequence.blocks = found
        sequence.num_computed = len(found) * self.limits.block_size
        sequence.num_registered = len(found)
        if sequence.num_cached < 0:
            sequence.num_cached = sequence.num_computed
            self.counters.prefix_queries += sequence.num_known
            self.counters.prefix_hits += sequence.num_computed

    def _extend_keys(self, sequence: Sequence, blocks: int) -> None:
        size = self.limits.block_size
        while len(sequence.keys) < blocks:
            number = len(sequence.keys)
            parent = sequence.keys[-1] if number else sequence.group.root
            sequence.keys.append(next_key(parent, sequence.tokens[number * size : (number + 1) * size]))

    def _register(self, sequence: Sequence) -> None:
        """Make the full blocks findable. They may still be in flight: whoever finds them runs after, or in the same step,
        where all keys are written before any is read."""
        if not self.limits.prefix_caching:
            return
        full = min(sequence.num_computed, len(sequence.tokens)) // self.limits.block_size
        self._extend_keys(sequence, full)
        for number in range(sequence.num_registered, full):
            self.pool.register(sequence.blocks[number], sequence.keys[number])
        sequence.num_registered = max(sequence.num_registered, full)

    def _preempt(self, sequence: Sequence, plan: _Plan) -> None:
        self._running.remove(sequence)
        self._give_back(sequence)
        sequence.num_preemptions += 1
        self.counters.preemptions += 1
        plan.preempted.append(sequence.id)
        insort(self._waiting, sequence, key=_order)

    # -- sequences ----------------------------------------------------------------------------------------------------

    def _longest(self, request: EngineRequest) -> int:
        prompt, most = len(request.prompt_token_ids), request.params.max_tokens
        limit = self.limits.max_model_len
        return limit if most is None else min(limit, prompt + most)

    def _new_sequence(self, group: Group, index: int, tokens: list[int], max_length: int) -> Sequence:
        sequence = Sequence(
            self._next_id, group, index, tokens, prompt_length=len(group.request.prompt_token_ids), max_length=max_length
        )
        self._next_id += 1
        self._sequences[sequence.id] = group.sequences[sequence.id] = sequence
        return sequence

    def _give_back(self, sequence: Sequence) -> None:
        """Release the sequence's blocks: nothing of it is computed any more."""
        self.pool.release_all(sequence.blocks)
        sequence.running, sequence.blocks, sequence.num_computed, sequence.num_registered = False, [], 0, 0

    def _drop(self, sequence: Sequence) -> None:
        queue = self._running if sequence.running else self._waiting
        if sequence in queue:
            queue.remove(sequence)
        self._give_back(sequence)
        del self._sequences[sequence.id], sequence.group.sequences[sequence.id]


class _Plan:
    """A step in the making."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.short = False  # blocks ran out: nobody new is let in
        self.chunks: list[Chunk] = []
        self.copies: list[tuple[int, int]] = []
        self.preempted: list[int] = []


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.order
