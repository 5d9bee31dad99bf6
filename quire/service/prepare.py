"""From a request in a client's words to prompts in tokens with checked parameters.

Renders chat templates, tokenizes, lays the sampling values over each other (request > flag > preset > generation_config >
default) and refuses what the model cannot do, so that everything a caller can get wrong is told before a token is computed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from quire import presets
from quire.errors import InvalidRequest
from quire.request import BeamSearchParams, RequestOutputKind, SamplingParams
from quire.service.limits import Limits
from quire.service.requests import TextRequest
from quire.text import chat

_SAMPLING_FIELDS = frozenset(field.name for field in fields(SamplingParams))


@dataclass(frozen=True)
class PreparedPrompt:
    """One prompt as the engine takes it; `text` is what an echo shows."""

    token_ids: list[int]
    text: str
    params: SamplingParams
    beam: BeamSearchParams | None


@dataclass(frozen=True)
class Prepared:
    """All prompts of a request; `drawn` samples are computed for each, of which `n` are answered."""

    prompts: tuple[PreparedPrompt, ...]
    n: int
    drawn: int

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)


def prepare(request: TextRequest, engine: Any, limits: Limits, *, stream: bool) -> Prepared:
    """Render, tokenize and check. Pure computation: the caller decides on which thread it runs."""
    try:
        return _prepare(request, engine, limits, stream)
    except InvalidRequest as error:
        raise in_clients_words(error, request) from None


def in_clients_words(error: InvalidRequest, request: TextRequest) -> InvalidRequest:
    """The same error under the field name that the client used (`max_completion_tokens`, `top_logprobs`, ...)."""
    own, theirs = error.parameter, request.field_names.get(error.parameter or "")
    if own is None or theirs is None:
        return error
    message = theirs + error.message[len(own) :] if error.message.startswith(own) else error.message
    return InvalidRequest(message, parameter=theirs, value=error.value)


def _prepare(request: TextRequest, engine: Any, limits: Limits, stream: bool) -> Prepared:
    drawn = request.best_of if request.best_of is not None else request.n
    _check_counts(request, engine, limits, drawn, stream)
    values = sampling_values(request, engine)
    beam_width = drawn if request.use_beam_search else None
    values["n"] = 1 if request.use_beam_search else drawn
    if request.best_of is not None and request.best_of > request.n and values.get("logprobs") is None:
        values["logprobs"] = 0  # the cumulative log-probability that picks the best
    values["output_kind"] = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
    prompts = tuple(
        _prepare_prompt(text, ids, dict(values), beam_width, request, engine) for text, ids in _tokenize(request, engine)
    )
    return Prepared(prompts=prompts, n=request.n, drawn=drawn)


def _check_counts(request: TextRequest, engine: Any, limits: Limits, drawn: int, stream: bool) -> None:
    count = 1 if request.messages is not None else len(request.prompts)
    if drawn < request.n:
        raise InvalidRequest(
            f"best_of must be greater than or equal to n={request.n}, got {drawn}.", parameter="best_of", value=drawn
        )
    if stream and drawn > request.n:
        raise InvalidRequest(
            f"best_of must be equal to n={request.n} when stream is true, got {drawn}.",
            parameter="best_of",
            value=drawn,
        )
    if stream and request.use_beam_search:
        raise InvalidRequest("use_beam_search cannot be combined with stream.", parameter="use_beam_search", value=True)
    if drawn < 1 or drawn * count > limits.max_samples:
        name = "n" if request.best_of is None else "best_of"
        raise InvalidRequest(
            f"{name} must be at least 1 and {name} x prompts at most {limits.max_samples}, got {drawn} x {count}.",
            parameter="prompt" if count > limits.max_samples else name,
            value=None if count > limits.max_samples else drawn,
        )
    if request.priority and engine.config.scheduling_policy != "priority":
        raise InvalidRequest(
            f"priority must be 0 unless the server runs with --scheduling-policy priority, got {request.priority}.",
            parameter="priority",
            value=request.priority,
        )


def sampling_values(request: TextRequest, engine: Any) -> dict[str, Any]:
    """The sampling values in force, without those that stay at SamplingParams' own defaults."""
    flags = dict(engine.config.override_generation_config)
    if "max_new_tokens" in flags:  # the name in generation_config.json
        flags.setdefault("max_tokens", flags["max_new_tokens"])
    resolved = presets.resolve(
        request={**request.sampling, "preset": request.preset},
        flags=flags,
        preset=engine.config.preset,
        generation_config=engine.default_sampling,
    )
    values = {name: found.value for name, found in resolved.items() if name in _SAMPLING_FIELDS}
    values.setdefault("max_tokens", request.max_tokens_default)
    return values


def _tokenize(request: TextRequest, engine: Any) -> list[tuple[str | None, list[int]]]:
    """(text if the client gave text, token ids) of each prompt."""
    if request.messages is not None:
        text = render(request, engine)
        return [(text, engine.tokenizer.encode(text, add_special_tokens=request.add_special_tokens))]
    made: list[tuple[str | None, list[int]]] = []
    for prompt in request.prompts:
        if isinstance(prompt, str):
            made.append((prompt, engine.tokenizer.encode(prompt, add_special_tokens=request.add_special_tokens)))
        else:
            made.append((None, list(prompt)))
    return made


def render(request: TextRequest, engine: Any) -> str:
    """The conversation as the model's template writes it; an adapter may bring one of its own."""
    assert request.messages is not None
    own = engine.adapters.get(request.adapter).chat_template if request.adapter else None
    return chat.render(
        engine.tokenizer,
        request.messages,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        chat_template=own or engine.config.chat_template,
        chat_template_kwargs=dict(request.chat_template_kwargs or {}),
    )


def _prepare_prompt(
    text: str | None, ids: list[int], values: dict[str, Any], beam_width: int | None, request: TextRequest, engine: Any
) -> PreparedPrompt:
    longest, named = engine.plan.max_model_len, "messages" if request.messages is not None else "prompt"
    vocabulary = engine.model_config.vocab_size
    whole, ids = ids, _truncated(ids, values, longest)
    if not ids:
        raise InvalidRequest(f"{named} must have at least one token.", parameter=named)
    outside = [token for token in ids if not 0 <= token < vocabulary]
    if outside:
        raise InvalidRequest(
            f"{named} contains token ids outside the vocabulary of {vocabulary}: {outside[:10]}.", parameter=named
        )
    room = longest - len(ids)
    if room < 1:
        raise InvalidRequest(
            f"This model's maximum context length is {longest} tokens. However, your {named} has {len(ids)} tokens and at "
            f"least one is needed for the answer. Please shorten the {named}.",
            parameter=named,
            value=len(ids),
        )
    _fit(values, room, longest, len(ids), named, request)
    params = SamplingParams(**values)
    params.check_model(vocab_size=vocabulary, max_logprobs=engine.config.max_logprobs)
    beam = None if beam_width is None else _beam(beam_width, params, request)
    return PreparedPrompt(token_ids=ids, text=_shown(text if ids is whole else None, ids, engine), params=params, beam=beam)


def _truncated(ids: list[int], values: dict[str, Any], longest: int) -> list[int]:
    """The last `truncate_prompt_tokens` tokens; -1 keeps as many as leave room for the answer."""
    keep = values.pop("truncate_prompt_tokens", None)
    if keep is None:
        return ids
    if type(keep) is not int or keep == 0 or keep < -1:
        raise InvalidRequest(
            f"truncate_prompt_tokens must be -1 or at least 1, got {keep}.",
            parameter="truncate_prompt_tokens",
            value=keep,
        )
    if keep > longest:
        raise InvalidRequest(
            f"truncate_prompt_tokens must be at most the context length of {longest}, got {keep}.",
            parameter="truncate_prompt_tokens",
            value=keep,
        )
    wanted = values.get("max_tokens")
    if keep == -1:
        keep = max(1, longest - (wanted if isinstance(wanted, int) and wanted > 0 else 1))
    return ids[-keep:]


def _fit(values: dict[str, Any], room: int, longest: int, prompt_tokens: int, named: str, request: TextRequest) -> None:
    """Settle max_tokens: what the client named must fit, a default is lowered to what fits."""
    wanted = values.get("max_tokens")
    if request.echo_only:
        values["max_tokens"], values["min_tokens"] = 1, 0
    elif wanted is None:
        values["max_tokens"] = room
    elif isinstance(wanted, int) and wanted > room:
        if "max_tokens" in request.sampling:
            raise InvalidRequest(
                f"This model's maximum context length is {longest} tokens. However, you requested {prompt_tokens + wanted} "
                f"tokens ({prompt_tokens} in the {named}, {wanted} in the completion). Please reduce the length of the "
                f"{named} or max_tokens to at most {room}.",
                parameter="max_tokens",
                value=wanted,
            )
        values["max_tokens"] = room


def _beam(width: int, params: SamplingParams, request: TextRequest) -> BeamSearchParams:
    assert params.max_tokens is not None
    return BeamSearchParams(
        beam_width=width,
        max_tokens=params.max_tokens,
        ignore_eos=params.ignore_eos,
        temperature=params.temperature,
        length_penalty=request.length_penalty,
        include_stop_str_in_output=params.include_stop_str_in_output,
    )


def _shown(text: str | None, ids: list[int], engine: Any) -> str:
    return text if text is not None else engine.tokenizer.decode(ids, skip_special_tokens=False)
