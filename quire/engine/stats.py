"""What the engine counts and says about itself: metrics after each step, a line every ten seconds, advice when blocks run
short."""

from __future__ import annotations

from collections.abc import Callable

from quire.engine.arrivals import Arrivals
from quire.engine.progress import Progress
from quire.log import logger
from quire.metrics import FinishedRequest, Metrics
from quire.plan.memory import Plan
from quire.scheduler.scheduler import Counters, Scheduler
from quire.scheduler.speculator import SpeculationCounters
from quire.scheduler.step import Step

log = logger(__name__)
INTERVAL = 10.0


class Stats:
    """Turns the scheduler's totals into increments and, every INTERVAL seconds of work, into log lines."""

    def __init__(
        self,
        metrics: Metrics,
        scheduler: Scheduler,
        plan: Plan,
        clock: Callable[[], float],
        log_stats: bool,
        arrivals: Arrivals | None = None,
    ) -> None:
        self.metrics = metrics
        self._arrivals = arrivals
        self._scheduler, self._plan, self._clock, self._log_stats = scheduler, plan, clock, log_stats
        self._told, self._told_drafts, self._logged_drafts = Counters(), SpeculationCounters(), SpeculationCounters()
        self._logged, self._prompt, self._generated, self._preempted = clock(), 0, 0, 0
        rules = scheduler.limits.speculation
        if rules is not None:
            metrics.set_speculation(rules.num_speculative_tokens)

    def step(self, step: Step, generated: int) -> None:
        """After every step; `generated`: tokens that samples took."""
        scheduler, now, told = self._scheduler, self._scheduler.counters, self._told
        prompt = 0
        for chunk in step.chunks:
            sequence = scheduler.sequence(chunk.sequence)
            if sequence is not None and chunk.start < sequence.prompt_length <= chunk.start + len(chunk.tokens):
                prompt += sequence.prompt_length
        self.metrics.observe_step(
            scheduler.num_running,
            self._num_waiting,
            step.num_tokens,
            scheduler.usage,
            now.preemptions - told.preemptions,
            now.prefix_queries - told.prefix_queries,
            now.prefix_hits - told.prefix_hits,
            prompt_tokens=prompt,
            generation_tokens=generated,
        )
        drafts = scheduler.speculated.since(self._told_drafts)
        if drafts.drafts:
            self.metrics.observe_drafts(drafts.drafts, drafts.draft_tokens, drafts.accepted_at)
            self._told_drafts = scheduler.speculated.copy()
        self._prompt += prompt
        self._generated += generated
        self._preempted += now.preemptions - told.preemptions
        self._told = Counters(now.preemptions, now.prefix_queries, now.prefix_hits)
        self._tell_adapters()
        if self._clock() - self._logged >= INTERVAL:
            self._log()

    def finished(self, progress: Progress) -> None:
        """A request has ended, in whatever way; also the place where gauges return to rest."""
        params = progress.request.params
        self.metrics.observe_finished(
            FinishedRequest(
                prompt_tokens=len(progress.request.prompt_token_ids),
                generation_tokens=[len(sample.token_ids) for sample in progress.samples],
                reasons=[sample.finish_reason or "abort" for sample in progress.samples],
                times=progress.metrics,
                n=params.n,
                max_tokens=params.max_tokens,
                cached_tokens=progress.num_cached_tokens,
            )
        )
        self.rest()

    def rest(self) -> None:
        """Show the present numbers, without a step."""
        scheduler = self._scheduler
        self.metrics.observe_step(scheduler.num_running, self._num_waiting, 0, scheduler.usage, 0, 0, 0)
        self._tell_adapters()

    @property
    def _num_waiting(self) -> int:
        return self._scheduler.num_waiting + len(self._arrivals or ())

    def _tell_adapters(self) -> None:
        """Which adapters run and which are waited for."""
        if self._arrivals is not None:
            running, waiting = self._scheduler.adapters()
            names = self._arrivals.names()
            self.metrics.set_lora_requests(self._scheduler.limits.max_loras, sorted(running), sorted(waiting | names))

    def _log(self) -> None:
        scheduler, seconds = self._scheduler, self._clock() - self._logged
        counters = scheduler.counters
        if self._log_stats:
            log.info(
                "prompt %.1f tokens/s, generation %.1f tokens/s, running %d, waiting %d, KV cache %.1f %%, prefix hits %.1f %%",
                self._prompt / seconds,
                self._generated / seconds,
                scheduler.num_running,
                scheduler.num_waiting,
                100 * scheduler.usage,
                100 * counters.prefix_hits / max(1, counters.prefix_queries),
            )
            self._log_drafts()
        if self._preempted:
            log.warning("%s", self._advice(seconds))
        self._logged, self._prompt, self._generated, self._preempted = self._clock(), 0, 0, 0

    def _log_drafts(self) -> None:
        drafts = self._scheduler.speculated.since(self._logged_drafts)
        if drafts.drafts:
            share = 100 * drafts.accepted / drafts.draft_tokens
            log.info("drafts %d of %d tokens, %.1f %% of them came true", drafts.drafts, drafts.draft_tokens, share)
        self._logged_drafts = self._scheduler.speculated.copy()

    def _advice(self, seconds: float) -> str:
        """What would stop the preemptions, with values: room for every present sequence at the length that it may reach."""
        scheduler, plan = self._scheduler, self._plan
        needed, sequences = scheduler.blocks_at_full_length(), scheduler.num_running + scheduler.num_waiting
        average = -(-needed // max(1, sequences)) * plan.block_size
        return (
            f"{self._preempted} preemptions in {seconds:.0f} s: {sequences} sequences may need "
            f"{needed:,} KV blocks, there are {plan.num_blocks:,}. Either --kv-cache-memory-bytes "
            f"{(needed + 1) * plan.bytes_per_block} or --max-num-seqs {max(1, plan.sequences_that_fit(average))} "
            "would avoid them."
        )
