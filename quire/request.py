"""What a user asks of the engine and what comes back: the one validated request type behind every door.

Field names, defaults and message style are vLLM's. This room knows no torch, no tokenizer and no HTTP; ranges that need the
model (vocabulary, context length) are checked by `SamplingParams.check_model` when the engine accepts a request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any

from quire.errors import InvalidRequest, did_you_mean
from quire.presets import sampling_of

MAX_SEED = 2**63 - 1
MAX_STOP_STRINGS, MAX_STOP_LENGTH = 16, 256
MAX_LOGIT_BIAS, MAX_BAD_WORDS = 1024, 256
MAX_SAMPLES = 128


class RequestOutputKind(Enum):
    """CUMULATIVE: each output holds everything so far. DELTA: only what is new. FINAL_ONLY: one output at the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class SamplingParams:
    """How the tokens of one request are chosen.

    n: samples of one prompt, each with its own draw. seed: the same tokens alone, in any batch, at any position in it.
    temperature: 0 is greedy. top_k: 0 or -1 is off. repetition_penalty: over prompt and output, divides positive and
    multiplies negative logits; frequency and presence penalties: over the output only. stop: strings, the earliest to be
    completed wins. min_tokens: until then end-of-sequence and stop tokens are masked and stop strings are not looked for.
    logprobs: number of alternatives beside the sampled token, -1 for the whole vocabulary; taken from the raw logits.
    logit_bias: added to the logits, clamped to [-100, 100]. bad_words: strings that must not be completed.
    truncate_prompt_tokens: keep that many last tokens of the prompt, -1 for as many as fit.

    Raises InvalidRequest naming field, range and value.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    truncate_prompt_tokens: int | None = None
    skip_reading_prefix_cache: bool | None = None

    def __post_init__(self) -> None:
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        self.stop_token_ids = list(self.stop_token_ids or [])
        self.bad_words = list(self.bad_words or [])
        if self.top_k == -1:
            self.top_k = 0
        if self.seed == -1:
            self.seed = None
        if self.logprobs is True:
            self.logprobs = 1
        if self.prompt_logprobs is True:
            self.prompt_logprobs = 1
        if self.logit_bias is not None:
            self.logit_bias = _read_logit_bias(self.logit_bias)
        self._check_numbers()
        self._check_lists()
        if self.greedy and self.n > 1:
            raise InvalidRequest(f"n must be 1 when using greedy sampling, got {self.n}.", parameter="n", value=self.n)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @classmethod
    def preset(cls, name: str, **changes: Any) -> SamplingParams:
        """The sampling half of a scenario preset (see `quire presets`), with `changes` on top."""
        known = {f.name for f in fields(cls)}
        for key in changes:
            if key not in known:
                raise InvalidRequest(f"unknown sampling parameter {key!r}.{did_you_mean(key, known)}", parameter=key)
        return cls(**{**sampling_of(name), **changes})

    def clone(self, **changes: Any) -> SamplingParams:
        """A checked copy with `changes`; the original is left alone."""
        return replace(self, **changes)

    def _check_numbers(self) -> None:
        for name, low, high, message in _RANGES:
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise InvalidRequest(f"{name} must be a finite number, got {value!r}.", parameter=name, value=value)
            if name in _WHOLE and not isinstance(value, int):
                raise InvalidRequest(f"{name} must be an integer, got {value!r}.", parameter=name, value=value)
            if not low <= value <= high:
                raise InvalidRequest(f"{name} must be {message}, got {value}.", parameter=name, value=value)
        if self.top_p <= 0:
            raise InvalidRequest(f"top_p must be in (0, 1], got {self.top_p}.", parameter="top_p", value=self.top_p)
        if self.repetition_penalty <= 0:
            raise InvalidRequest(
                f"repetition_penalty must be greater than zero, got {self.repetition_penalty}.",
                parameter="repetition_penalty",
                value=self.repetition_penalty,
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens must be less than or equal to max_tokens={self.max_tokens}, got {self.min_tokens}.",
                parameter="min_tokens",
                value=self.min_tokens,
            )
        if self.truncate_prompt_tokens == 0:
            raise InvalidRequest(
                "truncate_prompt_tokens must be -1 or at least 1, got 0.", parameter="truncate_prompt_tokens", value=0
            )

    def _check_lists(self) -> None:
        for name, most in (("stop", MAX_STOP_STRINGS), ("bad_words", MAX_BAD_WORDS)):
            words = getattr(self, name)
            if not all(isinstance(word, str) for word in words):
                raise InvalidRequest(f"{name} must be a list of strings.", parameter=name, value=words)
            if any(not word for word in words):
                raise InvalidRequest(f"{name} cannot contain an empty string.", parameter=name, value=words)
            if len(words) > most:
                raise InvalidRequest(f"{name} must have at most {most} entries, got {len(words)}.", parameter=name)
        for word in self.stop:
            if len(word) > MAX_STOP_LENGTH:
                raise InvalidRequest(
                    f"stop strings must have at most {MAX_STOP_LENGTH} characters, got {len(word)}.", parameter="stop"
                )
        if self.stop and not self.detokenize:
            raise InvalidRequest(
                "stop strings are only supported when detokenize is True. Set detokenize=True to use stop.",
                parameter="stop",
                value=self.stop,
            )
        for name in ("stop_token_ids", "allowed_token_ids"):
            ids = getattr(self, name)
            if ids is not None and not all(type(token) is int for token in ids):
                raise InvalidRequest(f"{name} must be a list of integers.", parameter=name, value=ids)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequest("allowed_token_ids must not be empty.", parameter="allowed_token_ids", value=[])

    def check_model(self, *, vocab_size: int, max_logprobs: int) -> None:
        """Check what only the model can tell: token ids within the vocabulary, alternatives within `--max-logprobs`."""
        for name, ids in (
            ("logit_bias", list(self.logit_bias or ())),
            ("allowed_token_ids", self.allowed_token_ids or []),
            ("stop_token_ids", self.stop_token_ids),
        ):
            outside = [token for token in ids if not 0 <= token < vocab_size]
            if outside:
                raise InvalidRequest(
                    f"token_id(s) {outside[:10]} in {name} contain out-of-vocab token ids. Vocabulary size: {vocab_size}",
                    parameter=name,
                    value=outside[:10],
                )
        for name, label in (("logprobs", "sample"), ("prompt_logprobs", "prompt")):
            count = getattr(self, name)
            count = vocab_size if count == -1 else count
            if count is not None and max_logprobs != -1 and count > max_logprobs:
                raise InvalidRequest(
                    f"Requested {label} logprobs of {count}, which is greater than max allowed: {max_logprobs}",
                    parameter=name,
                    value=count,
                )


_HUGE = 2**31 - 1
_WHOLE = {"n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "truncate_prompt_tokens"}
_RANGES: tuple[tuple[str, float, float, str], ...] = (
    ("n", 1, MAX_SAMPLES, f"at least 1 and at most {MAX_SAMPLES}"),
    ("presence_penalty", -2, 2, "in [-2, 2]"),
    ("frequency_penalty", -2, 2, "in [-2, 2]"),
    ("repetition_penalty", -math.inf, math.inf, "greater than zero"),
    ("temperature", 0, 2, "in [0, 2]"),
    ("top_p", -math.inf, 1, "in (0, 1]"),
    ("top_k", 0, _HUGE, "0 (disable), or at least 1"),
    ("min_p", 0, 1, "in [0, 1]"),
    ("seed", 0, MAX_SEED, "in [0, 2**63 - 1]"),
    ("max_tokens", 1, _HUGE, "at least 1"),
    ("min_tokens", 0, _HUGE, "greater than or equal to 0"),
    ("logprobs", -1, _HUGE, "non-negative or -1"),
    ("prompt_logprobs", -1, _HUGE, "non-negative or -1"),
    ("truncate_prompt_tokens", -1, _HUGE, "-1 or at least 1"),
)


def _read_logit_bias(bias: Mapping[Any, Any]) -> dict[int, float]:
    if len(bias) > MAX_LOGIT_BIAS:
        raise InvalidRequest(f"logit_bias must have at most {MAX_LOGIT_BIAS} entries, got {len(bias)}.", parameter="logit_bias")
    read = {}
    for token, value in bias.items():
        try:
            number = float(value)
            if not math.isfinite(number):
                raise ValueError
            read[int(token)] = min(100.0, max(-100.0, number))
        except (TypeError, ValueError):
            raise InvalidRequest(
                f"logit_bias must map token ids to finite numbers, got {token!r}: {value!r}.",
                parameter="logit_bias",
                value=token,
            ) from None
    return read


@dataclass
class BeamSearchParams:
    """Beam search: keep the `beam_width` sequences of highest cumulative log-probability / length ** length_penalty."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        if type(self.beam_width) is not int or not 1 <= self.beam_width <= MAX_SAMPLES:
            raise InvalidRequest(
                f"beam_width must be at least 1 and at most {MAX_SAMPLES}, got {self.beam_width}.",
                parameter="beam_width",
                value=self.beam_width,
            )
        if type(self.max_tokens) is not int or self.max_tokens < 1:
            raise InvalidRequest(
                f"max_tokens must be at least 1, got {self.max_tokens}.", parameter="max_tokens", value=self.max_tokens
            )
        if not 0 <= self.temperature <= 2:
            raise InvalidRequest(
                f"temperature must be in [0, 2], got {self.temperature}.", parameter="temperature", value=self.temperature
            )
        if not math.isfinite(self.length_penalty):
            raise InvalidRequest("length_penalty must be finite.", parameter="length_penalty", value=self.length_penalty)


@dataclass(frozen=True)
class Logprob:
    """One token's natural-log probability under the raw model, its rank (1 is most likely) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


LogprobsOfToken = dict[int, Logprob]


@dataclass
class CompletionOutput:
    """One sample of a request. finish_reason: stop | length | abort | error; stop_reason: the stop string or token id, None
    for end-of-sequence."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[LogprobsOfToken] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    lora_request: Any = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """Times of one request in seconds on the engine's monotonic clock; None until reached."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0


@dataclass
class RequestOutput:
    """What the engine tells of one request; `prompt_logprobs[0]` is None, as nothing precedes the first token."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[LogprobsOfToken | None] | None = None
    metrics: RequestMetrics | None = None
    lora_request: Any = None
    num_cached_tokens: int = 0
    error: Exception | None = None


@dataclass
class BeamSequence:
    """One finished beam: all tokens (prompt included), its text and its cumulative log-probability."""

    tokens: list[int]
    cum_logprob: float
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass
class BeamSearchOutput:
    """The best beams, best first."""

    sequences: list[BeamSequence]


@dataclass(frozen=True)
class EngineRequest:
    """A request that the engine has accepted: tokenized, validated, with its seed drawn. Priority: lower runs first."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    arrival_time: float
    prompt: str | None = None
    priority: int = 0
    cache_salt: str = ""
    beam: BeamSearchParams | None = None
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
    """End-of-sequence and stop tokens, masked until min_tokens."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token ids of every spelling of every bad word."""
    adapter: str = ""
    """Digest of the adapter's content; empty for the base alone."""
    lora_request: Any = None
    """The adapter as it was asked for, for outputs."""


def as_prompt(prompt: str | Sequence[int] | Mapping[str, Any]) -> tuple[str | None, list[int] | None]:
    """(text, token ids) of any accepted prompt form: text, token ids, {"prompt": ...} or {"prompt_token_ids": ...}."""
    if isinstance(prompt, str):
        return prompt, None
    if isinstance(prompt, Mapping):
        ids = prompt.get("prompt_token_ids")
        if ids is not None:
            return prompt.get("prompt"), list(ids)
        if isinstance(prompt.get("prompt"), str):
            return prompt["prompt"], None
        raise InvalidRequest("a prompt mapping must have 'prompt' or 'prompt_token_ids'.", parameter="prompt")
    ids = list(prompt)
    if not all(type(token) is int for token in ids):
        raise InvalidRequest("a prompt must be a string or a list of token ids.", parameter="prompt")
    return None, ids
