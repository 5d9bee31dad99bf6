"""The layout of chat completions, whole and streamed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from quire.server.schema.answers import Shape, chat_logprobs, prompt_logprobs
from quire.service.requests import Choice, Piece, Result, Usage


def whole(shape: Shape, result: Result) -> dict[str, Any]:
    """A `chat.completion` object."""
    made = shape.head("chat.completion")
    made["choices"] = [_choice(shape, choice) for choice in result.choices]
    made["usage"] = shape.usage(result.usage)
    if shape.prompt_logprobs:
        made["prompt_logprobs"] = prompt_logprobs(result.prompts[0].prompt_logprobs)
    if shape.token_ids:
        made["prompt_token_ids"] = result.prompts[0].token_ids
    return made


def _choice(shape: Shape, choice: Choice) -> dict[str, Any]:
    made: dict[str, Any] = {
        "index": choice.index,
        "message": {"role": shape.role, "content": choice.text, "refusal": None},
        "logprobs": chat_logprobs(shape, choice.logprobs),
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }
    if shape.token_ids:
        made["token_ids"] = choice.token_ids
    return made


async def chunks(shape: Shape, pieces: AsyncIterator[Piece], usage: Usage) -> AsyncIterator[dict[str, Any]]:
    """`chat.completion.chunk` objects: the role alone first, then text, and one finish reason for each index."""
    async for piece in pieces:
        if piece.first:
            opening = {"role": shape.role, "content": piece.opening}
            made = _chunk(shape, piece.index, opening, usage)
            if shape.token_ids:
                made["prompt_token_ids"] = list(piece.prompt_token_ids or [])
            yield made
        if piece.text or piece.token_ids or piece.finish_reason is not None:
            yield _delta(shape, piece, usage)
    if shape.usage_at_end:
        yield {**shape.head("chat.completion.chunk"), "choices": [], "usage": shape.usage(usage)}


def _delta(shape: Shape, piece: Piece, usage: Usage) -> dict[str, Any]:
    delta = {"content": piece.text} if piece.text or piece.finish_reason is None else {}
    made = _chunk(shape, piece.index, delta, usage)
    choice = made["choices"][0]
    choice["finish_reason"] = piece.finish_reason
    if piece.logprobs:
        choice["logprobs"] = chat_logprobs(shape, piece.logprobs)
    if piece.finish_reason is not None:
        choice["stop_reason"] = piece.stop_reason
    if shape.token_ids:
        choice["token_ids"] = list(piece.token_ids)
    return made


def _chunk(shape: Shape, index: int, delta: dict[str, Any], usage: Usage) -> dict[str, Any]:
    made = shape.head("chat.completion.chunk")
    made["choices"] = [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]
    if shape.usage_always:
        made["usage"] = shape.usage(usage)
    return made
