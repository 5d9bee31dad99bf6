"""Counters, gauges and histograms of one engine and its server, under vLLM's names so that its dashboards work.

This room imports nothing of Quire and starts no server: the engine thread and the event loop call small typed methods,
and `render()` gives the exposition text. A scrape reads these numbers only, it never waits for the engine thread. Label
values come from fixed sets (reasons, endpoints, the served model), never from what a client sent, so they are bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FINISH_REASONS = ("stop", "length", "abort", "error")
MOST_NAMES = 64
REJECTIONS = ("queued_requests", "queued_tokens", "key_concurrency", "draining", "not_ready")

_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_REQUEST = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_SAMPLES = (1, 2, 5, 10, 20)
_PREEMPTIONS = (0, 1, 2, 5, 10, 20, 50)


class RequestTimes(Protocol):
    """Seconds on one monotonic clock, None until reached: `quire.request.RequestMetrics` fits."""

    arrival_time: float
    first_scheduled_time: float | None
    first_token_time: float | None
    last_token_time: float | None
    finished_time: float | None
    num_preemptions: int


@dataclass(frozen=True)
class FinishedRequest:
    """What is counted once when a request ends. `generation_tokens` and `reasons` hold one entry for each sample."""

    prompt_tokens: int
    generation_tokens: Sequence[int]
    reasons: Sequence[str]
    times: RequestTimes
    n: int = 1
    max_tokens: int | None = None
    cached_tokens: int = 0


class Metrics:
    """One engine's numbers in a registry of its own. Every method may be called from any thread."""

    def __init__(self, model_name: str, max_model_len: int = 131_072) -> None:
        self._max_model_len = max_model_len
        self._sources: dict[str, tuple[str, Callable[[], float]]] = {}
        self._cache_config: dict[str, Any] = {}
        self._draft_places = 0
        self._build(model_name)

    def rename(self, model_name: str) -> None:
        """Label everything with the name that the server gives the model. Counters begin anew: call it first."""
        self._build(model_name)
        for name, (text, _) in self._sources.items():
            self._add_source(name, text)
        if self._cache_config:
            self.set_cache_config(**self._cache_config)
        self.set_speculation(self._draft_places)

    # called by the engine thread

    def observe_step(
        self,
        running: int,
        waiting: int,
        tokens: int,
        kv_usage: float,
        preemptions: int,
        prefix_queries: int,
        prefix_hits: int,
        *,
        prompt_tokens: int = 0,
        generation_tokens: int = 0,
    ) -> None:
        """After one step. All from `preemptions` on is what was added since the last call; `kv_usage` is in [0, 1].

        prompt_tokens: tokens of prompts whose last chunk was computed in this step; generation_tokens: tokens sampled.
        """
        self._running.set(running)
        self._waiting.set(waiting)
        self._kv_usage.set(kv_usage)
        if tokens:
            self._step_tokens.observe(tokens)
        for counter, amount in (
            (self._preemptions, preemptions),
            (self._prefix_queries, prefix_queries),
            (self._prefix_hits, prefix_hits),
            (self._prompt_tokens, prompt_tokens),
            (self._generation_tokens, generation_tokens),
        ):
            if amount:
                counter.inc(amount)

    def observe_drafts(self, drafts: int, tokens: int, accepted_at: Sequence[int]) -> None:
        """What was added since the last call: drafts, their tokens, and how often the token at each place came true."""
        self._drafts.inc(drafts)
        self._draft_tokens.inc(tokens)
        self._accepted_tokens.inc(sum(accepted_at))
        for place, accepted in enumerate(accepted_at):
            self._accepted_at[str(place)].inc(accepted)

    def observe_first_token(self, seconds: float) -> None:
        """Time from arrival to the first token of a request."""
        self._first_token.observe(seconds)

    def observe_inter_token(self, seconds: float) -> None:
        """Time between two tokens of one sample."""
        self._inter_token.observe(seconds)

    def observe_finished(self, request: FinishedRequest) -> None:
        """A request has ended, in whatever way."""
        for reason in request.reasons:
            self._success[reason if reason in self._success else "error"].inc()
        self._request_prompt_tokens.observe(request.prompt_tokens)
        self._request_generation_tokens.observe(sum(request.generation_tokens))
        self._request_longest.observe(max(request.generation_tokens, default=0))
        self._request_n.observe(request.n)
        if request.max_tokens is not None:
            self._request_max_tokens.observe(request.max_tokens)
        if request.cached_tokens:
            self._cached_tokens.inc(request.cached_tokens)
        self._observe_times(request)

    def observe_corrupted(self) -> None:
        """A request's logits held NaN; it was ended alone."""
        self._corrupted.inc()

    def set_cache_config(self, **values: Any) -> None:
        """Facts of the KV cache (block_size, num_gpu_blocks, ...) as labels of one gauge that is always 1."""
        self._cache_config = values
        labels = {name: str(value) for name, value in values.items()}
        gauge = Gauge(
            "vllm:cache_config_info",
            "Information of the KV cache configuration.",
            ["engine", *labels],
            registry=self._registry,
        )
        gauge.labels(engine="0", **labels).set(1)

    def set_speculation(self, tokens: int) -> None:
        """Drafts have up to `tokens` tokens; 0 for none. Makes a series for each place, as it is called once."""
        self._draft_places = tokens
        if tokens:
            self._accepted_at = self._each(
                "vllm:spec_decode_num_accepted_tokens_per_pos",
                "Accepted draft tokens by their place in the draft.",
                "position",
                [str(place) for place in range(tokens)],
            )

    def set_lora_requests(self, most: int, running: Sequence[str], waiting: Sequence[str]) -> None:
        """Which adapters run and which wait, as labels of a gauge whose value is the time, as at vLLM."""
        shown = (str(most), ",".join(waiting[:MOST_NAMES]), ",".join(running[:MOST_NAMES]))
        if shown != self._lora_shown:
            self._lora_shown = shown
            self._lora.clear()
            self._lora.labels(*shown).set_to_current_time()

    # called by the server

    def observe_adapter_load(self, seconds: float, ok: bool) -> None:
        """An adapter's folder was read, or was found to be unusable."""
        self._adapter_loads["ok" if ok else "failed"].inc()
        self._adapter_seconds.observe(seconds)

    def reject(self, reason: str) -> None:
        """A request was refused before any work was done; `reason` is one of REJECTIONS."""
        self._rejections[reason if reason in self._rejections else "not_ready"].inc()

    def http_request(self, endpoint: str, status: int) -> None:
        """A request was answered; `endpoint` is a route's template, not what the client typed."""
        self._http.labels(endpoint=endpoint, status=str(status)).inc()

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge `quire:<name>` whose value is read at each scrape; `read` must return at once. The last reader counts."""
        known = name in self._sources
        self._sources[name] = (text, read)
        if not known:
            self._add_source(name, text)

    def render(self) -> bytes:
        """Prometheus text format."""
        return generate_latest(self._registry)

    def value(self, name: str, **labels: str) -> float:
        """One sample's present value, 0 if it does not exist; for tests and the console."""
        labels = {"model_name": self.model_name, "engine": "0", **labels}
        return self._registry.get_sample_value(name, labels) or 0.0

    # construction

    def _build(self, model_name: str) -> None:
        self.model_name = model_name
        self._registry = CollectorRegistry()
        self._build_engine()
        self._build_request()
        self._rejections = self._each(
            "vllm:admission_rejections", "Requests refused at the door.", "reason", REJECTIONS
        )
        self._http = Counter(
            "quire:http_requests", "HTTP requests by route and status.", ["endpoint", "status"], registry=self._registry
        )

    def _build_engine(self) -> None:
        self._running = self._gauge("vllm:num_requests_running", "Requests in the running batch.")
        self._waiting = self._gauge("vllm:num_requests_waiting", "Requests waiting to be scheduled.")
        self._kv_usage = self._gauge("vllm:kv_cache_usage_perc", "KV cache in use; 1 is all of it.")
        self._prefix_queries = self._counter("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache.")
        self._prefix_hits = self._counter("vllm:prefix_cache_hits", "Tokens found in the prefix cache.")
        self._preemptions = self._counter("vllm:num_preemptions", "Requests put back for want of KV blocks.")
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens processed.")
        self._cached_tokens = self._counter("vllm:prompt_tokens_cached", "Prompt tokens that were not computed again.")
        self._generation_tokens = self._counter("vllm:generation_tokens", "Tokens generated.")
        self._step_tokens = self._histogram("vllm:iteration_tokens_total", "Tokens in one step.", _STEP_TOKENS)
        self._corrupted = self._counter("vllm:corrupted_requests", "Requests whose logits held NaN.")
        self._drafts = self._counter("vllm:spec_decode_num_drafts", "Drafts that were verified.")
        self._draft_tokens = self._counter("vllm:spec_decode_num_draft_tokens", "Tokens of drafts.")
        self._accepted_tokens = self._counter("vllm:spec_decode_num_accepted_tokens", "Draft tokens that came true.")
        self._lora_shown = ("", "", "")
        labels = ["max_lora", "waiting_lora_adapters", "running_lora_adapters"]
        self._lora = Gauge("vllm:lora_requests_info", "Running stats on lora requests.", labels, registry=self._registry)
        self._adapter_loads = self._each("quire:adapter_loads", "Adapters read.", "result", ("ok", "failed"))
        self._adapter_seconds = self._histogram("quire:adapter_load_seconds", "Time to read an adapter.", _PER_TOKEN)

    def _build_request(self) -> None:
        lengths = _one_two_five(self._max_model_len)
        self._success = self._each(
            "vllm:request_success", "Requests that ended, by reason.", "finished_reason", FINISH_REASONS
        )
        self._request_prompt_tokens = self._histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a request.", lengths
        )
        self._request_generation_tokens = self._histogram(
            "vllm:request_generation_tokens", "Tokens generated for a request.", lengths
        )
        self._request_longest = self._histogram(
            "vllm:request_max_num_generation_tokens", "Tokens of a request's longest sample.", lengths
        )
        self._request_n = self._histogram("vllm:request_params_n", "The n of a request.", _SAMPLES)
        self._request_max_tokens = self._histogram(
            "vllm:request_params_max_tokens", "The max_tokens of a request.", lengths
        )
        self._first_token = self._histogram("vllm:time_to_first_token_seconds", "Time to first token.", _FIRST_TOKEN)
        self._inter_token = self._histogram("vllm:inter_token_latency_seconds", "Time between tokens.", _PER_TOKEN)
        self._per_token = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time per token after the first.", _PER_TOKEN
        )
        self._end_to_end = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to end.", _REQUEST)
        self._queue_time = self._histogram("vllm:request_queue_time_seconds", "Arrival to first step.", _REQUEST)
        self._inference_time = self._histogram("vllm:request_inference_time_seconds", "First step to end.", _REQUEST)
        self._prefill_time = self._histogram(
            "vllm:request_prefill_time_seconds", "First step to first token.", _REQUEST
        )
        self._decode_time = self._histogram("vllm:request_decode_time_seconds", "First token to last.", _REQUEST)
        self._request_preemptions = self._histogram(
            "vllm:request_num_preemptions", "Times a request was put back.", _PREEMPTIONS
        )

    def _observe_times(self, request: FinishedRequest) -> None:
        times = request.times
        self._request_preemptions.observe(times.num_preemptions)
        end = times.finished_time if times.finished_time is not None else times.last_token_time
        if end is not None:
            self._end_to_end.observe(end - times.arrival_time)
        if times.first_scheduled_time is None:
            return
        self._queue_time.observe(times.first_scheduled_time - times.arrival_time)
        if end is not None:
            self._inference_time.observe(end - times.first_scheduled_time)
        if times.first_token_time is None:
            return
        self._prefill_time.observe(times.first_token_time - times.first_scheduled_time)
        if times.last_token_time is not None:
            decode = times.last_token_time - times.first_token_time
            self._decode_time.observe(decode)
            longest = max(request.generation_tokens, default=0)
            if longest > 1:
                self._per_token.observe(decode / (longest - 1))

    def _add_source(self, name: str, text: str) -> None:
        self._gauge(f"quire:{name}", text).set_function(lambda: self._sources[name][1]())

    def _counter(self, name: str, text: str) -> Any:
        return Counter(name, text, ["model_name", "engine"], registry=self._registry).labels(self.model_name, "0")

    def _gauge(self, name: str, text: str) -> Any:
        return Gauge(name, text, ["model_name", "engine"], registry=self._registry).labels(self.model_name, "0")

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Any:
        made = Histogram(name, text, ["model_name", "engine"], buckets=buckets, registry=self._registry)
        return made.labels(self.model_name, "0")

    def _each(self, name: str, text: str, label: str, values: Sequence[str]) -> dict[str, Any]:
        """One counter with a child for each of a fixed set of values, so that every series exists from the start."""
        made = Counter(name, text, ["model_name", "engine", label], registry=self._registry)
        return {value: made.labels(self.model_name, "0", value) for value in values}


def _one_two_five(highest: int) -> list[float]:
    """1, 2, 5, 10, 20, 50 ... up to `highest`."""
    buckets, power = [], 1
    while power <= highest:
        buckets += [float(step * power) for step in (1, 2, 5) if step * power <= highest]
        power *= 10
    return buckets or [1.0]
