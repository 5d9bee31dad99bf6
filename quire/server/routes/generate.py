"""What the generating routes have in common: from a body to an answer, whole or streamed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from quire.server.disconnect import unless_gone
from quire.server.options import ServerOptions
from quire.server.routes.openai import owner_of
from quire.server.schema.answers import Shape
from quire.server.schema.sampling import SamplingBody
from quire.server.sse import EventStream
from quire.service.application import Application
from quire.service.generation import Generation
from quire.service.requests import Piece, Result, TextRequest, Usage


@dataclass(frozen=True)
class Layout:
    """How one route writes its answers, and what its ids begin with."""

    prefix: str
    whole: Callable[[Shape, Result], dict[str, Any]]
    chunks: Callable[[Shape, AsyncIterator[Piece], Usage], AsyncIterator[dict[str, Any]]]


def application_of(request: Request) -> Application:
    """The application behind this server."""
    return request.app.state.application


def options_of(request: Request) -> ServerOptions:
    """This server's options."""
    return request.app.state.options


async def generate(request: Request, body: SamplingBody, to_request: Callable[[str], TextRequest], layout: Layout) -> Response:
    """Run a generation and answer it."""
    application, options = application_of(request), options_of(request)
    model = application.check_model(body.model, owner_of(request))
    request_id = f"{layout.prefix}-{body.request_id or request.state.request_id}"
    asked = replace(to_request(request_id), adapter=application.adapter_of(model))
    shape = _shape(request_id, model, body, options)
    ticket = request.state.ticket
    generation = await unless_gone(request, application.start(asked, ticket, stream=body.stream))
    if body.stream:
        events = layout.chunks(shape, generation.pieces(), generation.usage)
        return EventStream(_noted(events, request, generation), options, request.state.request_id)
    result = await unless_gone(request, generation.result())
    _note(request, generation)
    return JSONResponse(layout.whole(shape, result))


def _shape(request_id: str, model: str, body: SamplingBody, options: ServerOptions) -> Shape:
    as_ids = body.return_tokens_as_token_ids
    return Shape(
        id=request_id,
        model=model,
        role=options.response_role,
        token_ids=body.return_token_ids,
        as_token_ids=options.return_tokens_as_token_ids if as_ids is None else as_ids,
        prompt_logprobs=body.prompt_logprobs is not None,
        cached_tokens=options.enable_prompt_tokens_details,
        usage_at_end=body.wants_usage or options.enable_force_include_usage,
        usage_always=body.wants_running_usage,
    )


async def _noted(
    events: AsyncIterator[dict[str, Any]], request: Request, generation: Generation
) -> AsyncIterator[dict[str, Any]]:
    try:
        async for event in events:
            yield event
    finally:
        _note(request, generation)


def _note(request: Request, generation: Generation) -> None:
    """Facts for the log line; never the prompt's or the answer's text."""
    usage = generation.usage
    request.state.facts = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
