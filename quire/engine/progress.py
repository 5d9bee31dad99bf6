"""One request while it runs: text, log-probabilities and reasons to end, sample by sample. Knows no model and no blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

from quire.request import (
    CompletionOutput,
    EngineRequest,
    Logprob,
    LogprobsOfToken,
    RequestMetrics,
    RequestOutput,
    RequestOutputKind,
)
from quire.sampling.rows import SampledRow
from quire.text.stream import TextStream
from quire.text.tokenizer import Tokenizer

SEED_STRIDE = 0x9E3779B97F4A7C15
SEED_MASK = (1 << 63) - 1


@dataclass
class Sample:
    """One of a request's n samples. sent_tokens: how many of its tokens a DELTA output has carried."""

    index: int
    seed: int
    stream: TextStream
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[LogprobsOfToken] | None = None
    cumulative: float | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    sent_tokens: int = 0
    last_time: float | None = None


class Progress:
    """A request's state between its first step and its last."""

    def __init__(self, request: EngineRequest, tokenizer: Tokenizer, eos: int | None, max_model_len: int) -> None:
        params = request.params
        self.request = request
        self.samples = [self._new_sample(index, tokenizer) for index in range(params.n)]
        self.metrics = RequestMetrics(request.arrival_time)
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[LogprobsOfToken | None] | None = None if params.prompt_logprobs is None else [None]
        self._tokenizer, self._eos, self._max_model_len = tokenizer, eos, max_model_len

    def _new_sample(self, index: int, tokenizer: Tokenizer) -> Sample:
        params = self.request.params
        asked = params.logprobs is not None
        return Sample(
            index,
            # Sample 0 has the request's own seed, so that n changes nothing for it.
            (params.seed + index * SEED_STRIDE) & SEED_MASK,
            TextStream(tokenizer, self.request.prompt_token_ids, params),
            logprobs=[] if asked else None,
            cumulative=0.0 if asked else None,
        )

    @property
    def finished(self) -> bool:
        return all(sample.finish_reason is not None for sample in self.samples)

    def push(self, sample: Sample, row: SampledRow, now: float) -> None:
        """Take a sample's next token; sets its finish_reason when this is the last one."""
        params = self.request.params
        token = row.token
        sample.token_ids.append(token)
        if sample.logprobs is not None:
            sample.logprobs.append(self.describe(row))
            sample.cumulative += row.logprob
        sample.last_time = self.metrics.last_token_time = now
        enough = len(sample.token_ids) >= params.min_tokens
        if enough and not params.ignore_eos and token == self._eos:
            sample.finish_reason = "stop"
        elif enough and token in params.stop_token_ids:
            sample.finish_reason, sample.stop_reason = "stop", token
        if sample.finish_reason is None or params.include_stop_str_in_output:
            self._read(sample, token, enough)
        length = len(self.request.prompt_token_ids) + len(sample.token_ids)
        if sample.finish_reason is None and (len(sample.token_ids) >= params.max_tokens or length >= self._max_model_len):
            sample.finish_reason = "length"
        if sample.finish_reason is not None:
            sample.stream.finish()

    def _read(self, sample: Sample, token: int, enough: bool) -> None:
        stop = sample.stream.push([token], min_tokens_reached=enough)
        if stop is not None and sample.finish_reason is None:
            sample.finish_reason, sample.stop_reason = "stop", stop

    def describe(self, row: SampledRow) -> LogprobsOfToken:
        """The alternatives of one position, the chosen token always among them and, as at vLLM, first."""
        text = self._tokenizer.token_text
        entries = {row.token: Logprob(row.logprob, row.rank, text(row.token))}
        for rank, (token, logprob) in enumerate(row.top, 1):
            entries.setdefault(token, Logprob(logprob, rank, text(token)))
        return entries

    def push_prompt(self, position: int, rows: list[SampledRow]) -> None:
        """Log-probabilities of the prompt tokens after `position`; positions computed again after a preemption are skipped."""
        known = len(self.prompt_logprobs)
        for offset, row in enumerate(rows):
            if position + 1 + offset == known:
                self.prompt_logprobs.append(self.describe(row))
                known += 1

    def end(self, reason: str) -> None:
        """End every sample that still runs."""
        for sample in self.samples:
            if sample.finish_reason is None:
                sample.finish_reason = reason
                sample.stream.finish()

    def output(self, grown: list[Sample], error: Exception | None = None) -> RequestOutput | None:
        """What to tell after a step in which `grown` samples moved; None while a FINAL_ONLY request still runs."""
        kind = self.request.params.output_kind
        finished = self.finished
        if kind is RequestOutputKind.FINAL_ONLY:
            if not finished:
                return None
            grown = self.samples
        delta = kind is RequestOutputKind.DELTA
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self.request.prompt,
            prompt_token_ids=list(self.request.prompt_token_ids),
            outputs=[self._completion(sample, delta) for sample in grown],
            finished=finished,
            prompt_logprobs=self.prompt_logprobs,
            metrics=self.metrics,
            lora_request=self.request.lora_request,
            num_cached_tokens=self.num_cached_tokens,
            error=error,
        )

    def _completion(self, sample: Sample, delta: bool) -> CompletionOutput:
        start = sample.sent_tokens if delta else 0
        sample.sent_tokens = len(sample.token_ids)
        return CompletionOutput(
            index=sample.index,
            text=sample.stream.take() if delta else sample.stream.text,
            token_ids=sample.token_ids[start:],
            cumulative_logprob=sample.cumulative,
            logprobs=None if sample.logprobs is None else sample.logprobs[start:],
            finish_reason=sample.finish_reason,
            stop_reason=sample.stop_reason,
            lora_request=self.request.lora_request,
        )
