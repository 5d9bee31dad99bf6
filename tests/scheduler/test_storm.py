"""The production scheduler under a storm: whatever comes in whatever order, every token sees its own history, nobody is
passed over, nothing is lost and everything ends.
"""

from __future__ import annotations

import zlib
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from quire.engine.beam import BeamSearch
from quire.errors import InvalidRequest
from quire.request import BeamSearchParams, EngineRequest, SamplingParams
from quire.scheduler import adapters, speculator
from quire.scheduler.blocks import BlockPool
from quire.scheduler.prefix import root_key
from quire.scheduler.scheduler import Limits, Scheduler
from quire.scheduler.sequence import Sequence
from quire.scheduler.step import Step
from quire.scheduler.tables import NEVER
from quire.speculation import Speculation
from tests.scheduler.kv_contents import ALPHABET, Device, draw

EXAMPLES, RULES, LEAST, LEAST_DRAFTED, LEAST_PASSES = 400, 55, 10_000, 150, 50
MAX_MODEL_LEN = 48
STOP = ALPHABET  # only beams draw it
PROMPT = st.lists(st.integers(0, 1), min_size=1, max_size=14)
DRAFTS = st.builds(
    Speculation,
    num_speculative_tokens=st.integers(1, 5),
    prompt_lookup_min=st.integers(1, 2),
    prompt_lookup_max=st.integers(2, 4),
    most_rows=st.sampled_from([2, 4, 8, 32]),
)
ADAPTERS = st.sampled_from(["", "", "a", "a", "b", "c", "d"])
PASSES = 3
Candidates = tuple[tuple[int, float], ...]


def _root(request: EngineRequest) -> bytes:
    return root_key("model", request.adapter, request.cache_salt)


def is_last(tokens: list[int], prompt: int, max_tokens: int) -> bool:
    """Whether a sample ends here: a sixth of all histories end by themselves."""
    return len(tokens) - prompt >= max_tokens or zlib.crc32(bytes(tokens)) % 6 == 0


def offers(tokens: list[int], width: int) -> Candidates:
    """Candidates for a beam's next token; likelihoods depend on its history alone."""
    likelihoods = [-(zlib.crc32(bytes((*tokens, token))) % 1000) / 100 for token in range(ALPHABET + 1)]
    ranked = sorted(enumerate(likelihoods), key=lambda entry: (-entry[1], entry[0]))
    return tuple(ranked[: min(2 * width, len(ranked))])


@dataclass
class Job:
    """A request on its way, as the engine above the scheduler sees it."""

    request: EngineRequest
    beams: BeamSearch | None
    done: dict[int, list[int]] = field(default_factory=dict)
    """Samples that came to their end, by index."""
    cut: set[int] = field(default_factory=set)
    """Samples that were finished early, at a random moment."""

    @property
    def prompt(self) -> list[int]:
        return list(self.request.prompt_token_ids)

    def alone(self, index: int) -> list[int]:
        """The tokens of a sample if nothing else existed."""
        tokens = self.prompt
        while True:
            tokens.append(draw(tuple(tokens), index))
            if is_last(tokens, len(self.prompt), self.request.params.max_tokens):
                return tokens

    def beams_alone(self) -> list[list[int]]:
        search, params = new_search(self.request, 0), self.request.beam
        live = {0: self.prompt}
        while True:
            for number, tokens in live.items():
                search.offer(number, offers(tokens, params.beam_width))
            choices = search.choose()
            if not choices:
                return [found.tokens for found in search.best()]
            first = max(live) + 1
            live = {first + place: [*live[parent], token] for place, (parent, token) in enumerate(choices)}
            search.advance(list(live))


def new_search(request: EngineRequest, first: int) -> BeamSearch:
    return BeamSearch(request.beam, request.prompt_token_ids, first, request.params.max_tokens, frozenset({STOP}))


class Storm(RuleBasedStateMachine):
    """One engine's worth of scheduler, with up to three steps in flight."""

    operations = accepted = refuted = passes = 0

    @initialize(
        num_blocks=st.integers(5, 24),
        block_size=st.sampled_from([1, 2, 3, 4]),
        max_num_seqs=st.integers(1, 6),
        budget=st.integers(1, 24),
        threshold=st.sampled_from([0, 0, 1, 5]),
        policy=st.sampled_from(["fcfs", "priority"]),
        prefix_caching=st.sampled_from([True, True, False]),
        speculation=st.one_of(DRAFTS, DRAFTS, st.none()),
        max_loras=st.integers(1, 3),
        enough=st.sampled_from([0, 0, 1, 6]),
    )
    def begin(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        budget: int,
        threshold: int,
        policy: str,
        prefix_caching: bool,
        speculation: Speculation | None,
        max_loras: int,
        enough: int,
    ) -> None:
        self.pool = BlockPool(num_blocks)
        limits = Limits(
            max_num_seqs, budget, MAX_MODEL_LEN, block_size, threshold, policy, prefix_caching, speculation, max_loras, enough
        )
        self.scheduler = Scheduler(limits, self.pool, _root)
        self.device = Device(num_blocks, block_size)
        self.jobs: dict[str, Job] = {}
        self.in_flight: deque[tuple[Step, dict[int, list[int]], dict[int, Candidates]]] = deque()
        self.added = 0

    # -- rules --------------------------------------------------------------------------------------------------------

    @rule(
        prompt=PROMPT,
        n=st.integers(1, 4),
        max_tokens=st.integers(1, 12),
        salt=st.sampled_from(["", "", "other"]),
        priority=st.integers(0, 2),
        skip=st.sampled_from([None, None, True]),
        adapter=ADAPTERS,
    )
    def add(
        self, prompt: list[int], n: int, max_tokens: int, salt: str, priority: int, skip: bool | None, adapter: str
    ) -> None:
        params = SamplingParams(n=n, max_tokens=max_tokens, skip_reading_prefix_cache=skip)
        self._add(prompt, params, salt, priority, None, adapter)

    @rule(prompt=PROMPT, width=st.integers(1, 4), max_tokens=st.integers(1, 6), priority=st.integers(0, 2), adapter=ADAPTERS)
    def add_beams(self, prompt: list[int], width: int, max_tokens: int, priority: int, adapter: str) -> None:
        self._add(prompt, SamplingParams(max_tokens=max_tokens), "", priority, BeamSearchParams(width, max_tokens), adapter)

    @rule()
    def step(self) -> None:
        """Plan a step and bring the tokens of all that is in flight."""
        self._plan()
        while self.in_flight:
            self._deliver()

    @rule()
    @precondition(lambda self: len(self.in_flight) < 3)
    def plan_ahead(self) -> None:
        self._plan()

    @rule()
    @precondition(lambda self: self.in_flight)
    def deliver(self) -> None:
        self._deliver()

    @rule(which=st.integers(0, 1000))
    @precondition(lambda self: self.jobs)
    def abort(self, which: int) -> None:
        request_id = sorted(self.jobs)[which % len(self.jobs)]
        del self.jobs[request_id]
        self.scheduler.abort(request_id)
        self.scheduler.abort(request_id)  # and again, which must change nothing

    @rule(which=st.integers(0, 1000))
    @precondition(lambda self: any(job.beams is None for job in self.jobs.values()))
    def finish(self, which: int) -> None:
        """End a single sample (a stop string was found), in whatever state it is."""
        jobs = [job for job in self.jobs.values() if job.beams is None]
        job = jobs[which % len(jobs)]
        sequences = self.scheduler.sequences_of(job.request.request_id)
        if len(sequences) < job.request.params.n:
            return  # not before all samples exist
        sequence = sequences[which % len(sequences)]
        job.cut.add(sequence.index)
        self._finish(job, sequence)

    @rule()
    def forget(self) -> None:
        self.scheduler.forget_prefixes()
        self.device.epoch += 1
        assert self.pool.num_cached == 0

    @rule(max_num_seqs=st.integers(1, 8), budget=st.integers(1, 32), threshold=st.integers(0, 6))
    def change_limits(self, max_num_seqs: int, budget: int, threshold: int) -> None:
        limits = self.scheduler.limits
        limits.max_num_seqs, limits.max_num_batched_tokens = max_num_seqs, budget
        limits.long_prefill_token_threshold = threshold

    # -- what must hold after each of them ----------------------------------------------------------------------------

    @invariant()
    def blocks_are_counted(self) -> None:
        self.pool.check()
        listed = [0] * (self.pool.num_blocks + 1)
        for sequence in self._sequences():
            assert len(sequence.blocks) == len(set(sequence.blocks)), "a table lists a block twice"
            for block in sequence.blocks:
                listed[block] += 1
        assert listed[0] == 0, "the null block is in use"
        assert listed == [self.pool.holders(block) for block in range(self.pool.num_blocks + 1)]

    @invariant()
    def contents_are_what_tables_and_keys_say(self) -> None:
        for sequence in self._sequences():
            truth = self.device.truths[sequence.id].tokens
            assert sequence.tokens == truth[: len(sequence.tokens)]
            if sequence.num_drafts:  # how many tokens it has, only the device knows
                assert len(sequence.tokens) + sequence.num_pending <= len(truth)
                assert sequence.num_wanted == 0
            else:
                assert len(sequence.tokens) + sequence.num_pending == len(truth)
                assert len(sequence.blocks) == -(-sequence.num_computed // self.device.block_size), "blocks of nothing"
            verified = sequence.num_computed - sequence.num_drafts
            assert verified <= len(truth)
            assert sequence.num_registered * self.device.block_size <= max(0, verified) or sequence.num_registered == NEVER
            self.device.check_view(sequence.id, sequence.blocks, verified)
        self.device.check_keys(self.pool._block_of)

    @invariant()
    def queues_are_in_order(self) -> None:
        running, waiting = self.scheduler._running, self.scheduler._waiting
        for queue in (running, waiting):
            assert queue == sorted(queue, key=self._place)
        assert all(sequence.running for sequence in running)
        assert not any(sequence.running or sequence.blocks for sequence in waiting)
        assert {sequence.id for sequence in (*running, *waiting)} == {sequence.id for sequence in self._sequences()}
        assert len(running) + len(waiting) == len(self._sequences())
        assert set(self.jobs) == set(self.scheduler._groups)

    @invariant()
    def count(self) -> None:
        Storm.operations += 1

    def teardown(self) -> None:
        """Everything that is left runs to its end in a bounded number of steps, and every block comes home."""
        bound = 50 + 20 * sum(len(job.prompt) + job.request.params.max_tokens for job in self.jobs.values()) * 5
        while self.scheduler.has_work():
            self.step()
            self.blocks_are_counted()
            self.contents_are_what_tables_and_keys_say()
            bound -= 1
            assert bound, "no end in sight"
        while self.in_flight:
            self._deliver()
        assert not self.jobs
        assert self.pool.num_held == 0
        assert self.pool.num_free == self.pool.num_blocks
        assert self.scheduler.num_running == self.scheduler.num_waiting == self.scheduler.backlog() == 0
        Storm.accepted += self.scheduler.speculated.accepted
        Storm.refuted += self.scheduler.speculated.draft_tokens - self.scheduler.speculated.accepted

    # -- the engine's part --------------------------------------------------------------------------------------------

    def _place(self, sequence: Sequence) -> tuple[int, int, int]:
        """Where a sequence belongs in its queue."""
        request = sequence.group.request
        return (request.priority if self.scheduler.limits.policy == "priority" else 0, int(request.request_id), sequence.id)

    def _sequences(self) -> list[Sequence]:
        return list(self.scheduler._sequences.values())

    def _add(
        self,
        prompt: list[int],
        params: SamplingParams,
        salt: str,
        priority: int,
        beam: BeamSearchParams | None,
        adapter: str,
    ) -> None:
        self.added += 1
        request = EngineRequest(
            str(self.added), tuple(prompt), params, 0.0, priority=priority, cache_salt=salt, beam=beam, adapter=adapter
        )
        needed = -(-(len(prompt) + params.max_tokens) // self.device.block_size)
        if needed > self.pool.num_blocks:
            with pytest.raises(InvalidRequest, match=f"{needed}.*{self.pool.num_blocks}"):
                self.scheduler.add(request)
            return
        first = self.scheduler.add(request)
        self.device.know(first)
        self.jobs[request.request_id] = Job(request, new_search(request, first.id) if beam else None)

    def _plan(self) -> None:
        scheduler = self.scheduler
        before = {sequence.id for sequence in scheduler._running}
        existed = {sequence.id for sequence in self._sequences()}
        step = scheduler.schedule()
        if step is None:
            assert self.in_flight or not scheduler.has_work(), "there is work, nothing is in flight, and nothing is planned"
            return
        after = {sequence.id for sequence in scheduler._running}
        admitted = {number for number in after & existed if number not in before or number in step.preempted}
        self._check_limits(step, before, after)
        self._check_order(step, admitted, existed)
        candidates = {
            chunk.sequence: offers(self.device.truths[chunk.sequence].tokens, sequence.group.request.beam.beam_width)
            for chunk in step.chunks
            if (sequence := scheduler.sequence(chunk.sequence)).group.request.beam and chunk.draws
        }
        self.in_flight.append((step, self.device.run(step, scheduler, admitted), candidates))

    def _check_limits(self, step: Step, before: set[int], after: set[int]) -> None:
        limits = self.scheduler.limits
        assert 0 < step.num_tokens <= limits.max_num_batched_tokens
        assert len(after) <= max(limits.max_num_seqs, len(before))
        numbers = [chunk.sequence for chunk in step.chunks]
        assert len(numbers) == len(set(numbers)), "a sequence twice in a step"
        assert set(numbers) <= after
        threshold = limits.long_prefill_token_threshold
        known = [len(chunk.tokens) - chunk.drafts for chunk in step.chunks]
        assert all(0 < count <= (threshold or count) for count in known)
        assert all(chunk.adapter == self.scheduler.sequence(chunk.sequence).group.request.adapter for chunk in step.chunks)
        assert len(self._adapters_of_running()) <= limits.max_loras
        self._check_drafts(step)

    def _adapters_of_running(self) -> set[str]:
        return {sequence.adapter for sequence in self.scheduler._running} - {""}

    def _check_drafts(self, step: Step) -> None:
        """Drafts take what nobody else wants."""
        speculation = self.scheduler.limits.speculation
        drafted = [chunk for chunk in step.chunks if chunk.drafts]
        if not drafted:
            return
        assert not step.preempted
        assert step.num_tokens <= speculation.most_rows
        for chunk in drafted:
            assert chunk.drafts <= speculation.num_speculative_tokens
            assert chunk.draws == (chunk.sequence,)
            sequence = self.scheduler.sequence(chunk.sequence)
            assert sequence.group.request.beam is None
            assert len(sequence.tokens) + chunk.drafts < sequence.max_length

    def _check_order(self, step: Step, admitted: set[int], existed: set[int]) -> None:
        """Nobody enters while one before it has something to compute and waits, unless it waits for a place among the adapters,
        and then only so many; who gives way comes after all who stay, unless its adapter's place was needed."""
        running, most = self._adapters_of_running(), self.scheduler.limits.max_loras
        waiting, overdue = [], False
        for sequence in self.scheduler._waiting:
            if not sequence.num_wanted or sequence.id not in existed:
                continue
            assert sequence.num_passed <= PASSES
            Storm.passes += sequence.num_passed
            placed = sequence.adapter in {"", *running} or len(running) < most
            if placed and not (overdue and sequence.adapter):
                waiting.append(sequence.order)
            overdue |= not placed and sequence.num_passed == PASSES
        entered = [self.scheduler.sequence(number).order for number in admitted]
        assert not waiting or not entered or max(entered) < min(waiting)
        stayed = [sequence.order for sequence in self.scheduler._running if sequence.id not in admitted]
        gone = [
            sequence.order
            for sequence in self.scheduler._waiting
            if sequence.id in step.preempted
            and sequence.num_wanted
            and (sequence.adapter in {"", *running} or len(running) < most)
        ]
        assert not gone or not stayed or max(stayed) < min(gone)

    def _deliver(self) -> None:
        step, drawn, candidates = self.in_flight.popleft()
        for number, offered in candidates.items():
            self._offer(number, offered)
        for sequence in self.scheduler.update(step, drawn):
            job = self.jobs[sequence.group.request.request_id]
            for missing in reversed(range(len(drawn[sequence.id]))):
                tokens = sequence.tokens[: len(sequence.tokens) - missing]
                if is_last(tokens, len(job.prompt), job.request.params.max_tokens):
                    job.done[sequence.index] = tokens
                    self._finish(job, sequence)
                    break

    def _finish(self, job: Job, sequence: Sequence) -> None:
        self.scheduler.finish(sequence.id)
        self.scheduler.finish(sequence.id)  # and again, which must change nothing
        assert not job.done.keys() & job.cut
        if len(job.done) + len(job.cut) == job.request.params.n:
            for index, tokens in job.done.items():
                assert tokens == job.alone(index)
            del self.jobs[job.request.request_id]

    def _offer(self, number: int, candidates: Candidates) -> None:
        sequence = self.scheduler.sequence(number)
        if sequence is None:
            return
        request_id = sequence.group.request.request_id
        job = self.jobs[request_id]
        if not job.beams.offer(number, candidates):
            return
        choices = job.beams.choose()
        if choices:
            children = self.scheduler.branch(request_id, choices)
            for child in children:
                self.device.know(child)
            job.beams.advance([child.id for child in children])
            return
        assert [found.tokens for found in job.beams.best()] == job.beams_alone()
        del self.jobs[request_id]
        self.scheduler.abort(request_id)


def test_storm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculator, "FIXED_ROWS", 1000)  # drafts in larger steps too, worth it or not
    monkeypatch.setattr(adapters, "MOST_PASSES", PASSES)
    Storm.operations = Storm.accepted = Storm.refuted = Storm.passes = 0
    run_state_machine_as_test(
        Storm,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=RULES,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert Storm.operations >= LEAST
    assert min(Storm.accepted, Storm.refuted) >= LEAST_DRAFTED
    assert Storm.passes >= LEAST_PASSES
