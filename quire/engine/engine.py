"""The engine's loop: plan a step, run it, draw, tell. One thread owns an Engine; who calls it from where is others' business.

A fault in one request (corrupted logits, a detokenizer that chokes) ends that request. A fault in the forward pass ends the
requests of that step; the next ones are served.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from quire.engine.arrivals import Arrivals
from quire.engine.beam import BeamSearch
from quire.engine.drawing import draw
from quire.engine.progress import Progress, Sample
from quire.engine.runner import Result, Runner
from quire.engine.stats import Stats
from quire.errors import InvalidRequest, QuireError
from quire.log import logger
from quire.metrics import Metrics
from quire.plan.memory import Plan
from quire.request import BeamSearchParams, CompletionOutput, EngineRequest, RequestOutput
from quire.sampling.rows import SampledRow
from quire.sampling.sampler import score, top_candidates
from quire.scheduler.blocks import BlockPool
from quire.scheduler.prefix import root_key
from quire.scheduler.scheduler import Limits, Scheduler
from quire.scheduler.sequence import Sequence
from quire.scheduler.step import Step
from quire.text.tokenizer import Tokenizer

log = logger(__name__)


class Engine:
    """One model, its cache and all requests in progress. eos: the token that ends a text."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        plan: Plan,
        limits: Limits,
        *,
        model_digest: str,
        eos: int | None,
        metrics: Metrics,
        log_stats: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = Scheduler(
            limits,
            BlockPool(plan.num_blocks),
            lambda request: root_key(model_digest, request.adapter, request.cache_salt),
        )
        self.steps = 0
        self._runner, self._tokenizer, self._eos, self._clock = runner, tokenizer, eos, clock
        self._progress: dict[str, Progress] = {}
        self._beams: dict[str, BeamSearch] = {}
        self._scored: dict[int, int] = {}
        self._arrivals = Arrivals(runner.adapters.manager) if runner.adapters else None
        self._stats = Stats(metrics, self.scheduler, plan, clock, log_stats, self._arrivals)

    def has_work(self) -> bool:
        return self.scheduler.has_work() or bool(self._arrivals)

    @property
    def num_waiting(self) -> int:
        """Sequences that do not run, those that wait for their adapter among them."""
        return self.scheduler.num_waiting + len(self._arrivals or ())

    def add(self, request: EngineRequest) -> None:
        """Queue an accepted request. Raises InvalidRequest if its id is in use or it can never run."""
        self.scheduler.check(request)
        if request.request_id in self._progress:
            raise InvalidRequest(f"request_id {request.request_id!r} is already in use.", parameter="request_id")
        progress = Progress(request, self._tokenizer, self._eos, self.scheduler.limits.max_model_len)
        self._progress[request.request_id] = progress
        if request.adapter:
            self._arrivals.add(request)
        else:
            self._begin(progress, request)

    def sweep(self) -> None:
        """Between two steps: let go of adapters that have been removed."""
        self._runner.sweep()

    def _begin(self, progress: Progress, request: EngineRequest) -> None:
        """Hand the request to the scheduler: its adapter, if it has one, is in memory."""
        progress.request = request
        first = self.scheduler.add(request)
        if progress.prompt_logprobs is not None:
            self._scored[first.id] = len(request.prompt_token_ids)
        if request.beam is not None:
            prompt, stops = request.prompt_token_ids, request.stop_token_ids
            self._beams[request.request_id] = BeamSearch(request.beam, prompt, first.id, request.params.max_tokens, stops)

    def _let_in(self) -> list[RequestOutput]:
        """Requests whose adapter has come begin; those whose adapter cannot be had end."""
        outputs = []
        for request, lease in self._arrivals.settled() if self._arrivals else ():
            try:
                if lease.error is not None:
                    raise lease.error
                self._begin(self._progress[request.request_id], replace(request, adapter=lease.digest))
            except Exception as error:
                outputs.append(self._end(request.request_id, "error", error))
        return [output for output in outputs if output is not None]

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request in whatever state it is; returns its last output, None if it is unknown or has ended."""
        return self._end(request_id, "abort")

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; refused (False) while requests hold blocks."""
        if self.scheduler.pool.num_held:
            return False
        self.scheduler.forget_prefixes()
        return True

    def step(self) -> list[RequestOutput]:
        """Run one step and return what it changed; nothing if there was nothing to compute."""
        ended = self._let_in()
        step = self.scheduler.schedule()
        if step is None:
            if self._arrivals and not ended:
                self._arrivals.wait()
            return ended
        self.steps += 1
        self._mark_scheduled(step)
        try:
            result = self._runner.run(step, self._scored)
            drawn = draw(result, self.scheduler, self._progress)
        except Exception as error:
            log.exception("step %d failed; its %d sequences end", step.number, len(step.chunks))
            return ended + self._fail(step, error)
        return ended + self._tell(step, result, drawn)

    def _mark_scheduled(self, step: Step) -> None:
        now = self._clock()
        for chunk in step.chunks:
            sequence = self.scheduler.sequence(chunk.sequence)
            progress = self._progress[sequence.group.request.request_id]
            if progress.metrics.first_scheduled_time is None:
                progress.metrics.first_scheduled_time = now
                progress.num_cached_tokens = max(0, sequence.num_cached)
        for number in step.preempted:
            sequence = self.scheduler.sequence(number)
            self._progress[sequence.group.request.request_id].metrics.num_preemptions += 1

    # -- telling ------------------------------------------------------------------------------------------------------

    def _tell(self, step: Step, result: Result, drawn: dict[int, list[SampledRow]]) -> list[RequestOutput]:
        now = self._clock()
        outputs = self._score_prompts(result)
        outputs += self._move_beams(result)
        grown: dict[str, list[Sample]] = {}
        generated = 0
        for sequence in self.scheduler.update(step, {number: [row.token for row in rows] for number, rows in drawn.items()}):
            request_id = sequence.group.request.request_id
            try:
                sample, taken = self._push(sequence, drawn[sequence.id], now)
                grown.setdefault(request_id, []).append(sample)
                generated += taken
            except Exception as error:
                outputs.append(self._end(request_id, "error", error))
        for request_id, samples in grown.items():
            progress = self._progress.get(request_id)
            if progress is None:
                continue
            outputs.append(progress.output(samples))
            if progress.finished:
                self._forget(request_id)
        self._stats.step(step, generated)
        return [output for output in outputs if output is not None]

    def _push(self, sequence: Sequence, rows: list[SampledRow], now: float) -> tuple[Sample, int]:
        """Give a sample its tokens, until one of them ends it; returns the sample and how many it took."""
        progress = self._progress[sequence.group.request.request_id]
        sample = progress.samples[sequence.index]
        if sample.last_time is not None:
            # As at vLLM: the time between two steps' tokens, however many a step brings.
            self._stats.metrics.observe_inter_token(now - sample.last_time)
        for taken, row in enumerate(rows, 1):
            if row.corrupted:
                self._stats.metrics.observe_corrupted()
                raise CorruptedLogits(
                    "the model gave NaN or infinite logits for this request, or nothing was left to draw from."
                )
            if progress.metrics.first_token_time is None:
                progress.metrics.first_token_time = now
                self._stats.metrics.observe_first_token(now - progress.metrics.arrival_time)
            progress.push(sample, row, now)
            if sample.finish_reason is not None:
                self.scheduler.finish(sequence.id)
                return sample, taken
        return sample, len(rows)

    def _score_prompts(self, result: Result) -> list[RequestOutput | None]:
        ended = []
        for number, position, logits in result.prompt_logits():
            sequence = self.scheduler.sequence(number)
            if sequence is None:
                continue
            progress = self._progress[sequence.group.request.request_id]
            targets = progress.request.prompt_token_ids[position + 1 : position + 1 + len(logits)]
            try:
                progress.push_prompt(position, score(logits, targets, progress.request.params.prompt_logprobs))
            except Exception as error:
                ended.append(self._end(progress.request.request_id, "error", error))
        return ended

    def _move_beams(self, result: Result) -> list[RequestOutput | None]:
        ended = []
        for chunk, place in result.rows.draws:
            sequence = self.scheduler.sequence(chunk.sequence)
            if sequence is None or sequence.group.request.beam is None:
                continue
            request = sequence.group.request
            try:
                ended.append(self._offer(request, request.beam, chunk.sequence, result.logits[place : place + 1]))
            except Exception as error:
                ended.append(self._end(request.request_id, "error", error))
        return ended

    def _offer(self, request: EngineRequest, beam: BeamSearchParams, sequence: int, logits: Tensor) -> RequestOutput | None:
        beams = self._beams[request.request_id]
        (candidates,) = top_candidates(logits, min(beams.width_of_offer, logits.shape[-1]), beam.temperature)
        if not candidates:
            raise CorruptedLogits("the model gave NaN or infinite logits for this request.")
        if not beams.offer(sequence, candidates):
            return None
        choices = beams.choose()
        if choices:
            beams.advance([child.id for child in self.scheduler.branch(request.request_id, choices)])
            return None
        return self._end_beams(request, beams)

    def _end_beams(self, request: EngineRequest, beams: BeamSearch) -> RequestOutput:
        progress = self._progress[request.request_id]
        progress.end("stop")
        output = progress.output([])
        prompt = len(request.prompt_token_ids)
        output.outputs = []
        for index, found in enumerate(beams.best()):
            tokens = found.tokens[prompt:]
            shown = tokens[:-1] if found.finish_reason == "stop" and not request.beam.include_stop_str_in_output else tokens
            output.outputs.append(
                CompletionOutput(
                    index=index,
                    text=self._tokenizer.decode(shown, skip_special_tokens=request.params.skip_special_tokens),
                    token_ids=tokens,
                    cumulative_logprob=found.cum_logprob,
                    finish_reason=found.finish_reason,
                    lora_request=request.lora_request,
                )
            )
        output.finished = True
        self.scheduler.abort(request.request_id)
        self._forget(request.request_id)
        return output

    # -- ends ---------------------------------------------------------------------------------------------------------

    def _end(self, request_id: str, reason: str, error: Exception | None = None) -> RequestOutput | None:
        progress = self._progress.get(request_id)
        if progress is None:
            return None
        self.scheduler.abort(request_id)
        progress.end(reason)
        self._forget(request_id)
        if error is not None:
            log.warning("request %s ended by an error: %s", request_id, error)
        return progress.output(progress.samples, error)

    def _forget(self, request_id: str) -> None:
        progress = self._progress.pop(request_id)
        self._beams.pop(request_id, None)
        if self._arrivals is not None:
            self._arrivals.release(request_id)
            self.sweep()
        self._scored = {number: length for number, length in self._scored.items() if self.scheduler.sequence(number)}
        assert not self.scheduler.sequences_of(request_id), "a finished request still has sequences"
        progress.metrics.finished_time = self._clock()
        self._stats.finished(progress)

    def _fail(self, step: Step, error: Exception) -> list[RequestOutput]:
        """The forward pass has failed: what this step was to write cannot be trusted, nor found again."""
        self.scheduler.forget_prefixes()
        requests = {
            sequence.group.request.request_id
            for chunk in step.chunks
            if (sequence := self.scheduler.sequence(chunk.sequence)) is not None
        }
        failure = StepFailed(f"the engine failed on this step: {error}")
        outputs = [self._end(request_id, "error", failure) for request_id in requests]
        return [output for output in outputs if output is not None]


class CorruptedLogits(QuireError):
    """A request's logits were not numbers."""


class StepFailed(QuireError):
    """The forward pass raised."""
