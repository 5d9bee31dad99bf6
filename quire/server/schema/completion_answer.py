"""The layout of completions, whole and streamed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from quire.server.schema.answers import Shape, completion_logprobs, prompt_logprobs
from quire.service.requests import Choice, Piece, PromptResult, Result, Usage


def whole(shape: Shape, result: Result) -> dict[str, Any]:
    """A `text_completion` object."""
    made = shape.head("text_completion")
    made["choices"] = [_choice(shape, choice, result.prompts[choice.prompt_index]) for choice in result.choices]
    made["usage"] = shape.usage(result.usage)
    return made


def _choice(shape: Shape, choice: Choice, prompt: PromptResult) -> dict[str, Any]:
    made: dict[str, Any] = {
        "index": choice.index,
        "text": choice.text,
        "logprobs": completion_logprobs(shape, choice.logprobs)[0],
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }
    if shape.prompt_logprobs:
        made["prompt_logprobs"] = prompt_logprobs(prompt.prompt_logprobs)
    if shape.token_ids:
        made["prompt_token_ids"], made["token_ids"] = prompt.token_ids, choice.token_ids
    return made


async def chunks(shape: Shape, pieces: AsyncIterator[Piece], usage: Usage) -> AsyncIterator[dict[str, Any]]:
    """`text_completion` objects with what is new; an echoed prompt comes with its first text."""
    offsets: dict[int, int] = {}
    async for piece in pieces:
        entries = piece.logprobs
        if entries is not None and piece.opening_logprobs:
            entries = piece.opening_logprobs + entries
        logprobs, offsets[piece.index] = completion_logprobs(shape, entries, offsets.get(piece.index, 0))
        made = shape.head("text_completion")
        choice: dict[str, Any] = {
            "index": piece.index,
            "text": piece.opening + piece.text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
        }
        if piece.finish_reason is not None:
            choice["stop_reason"] = piece.stop_reason
        if shape.token_ids:
            choice["token_ids"] = list(piece.token_ids)
            if piece.first:
                choice["prompt_token_ids"] = list(piece.prompt_token_ids or [])
        made["choices"] = [choice]
        if shape.usage_always:
            made["usage"] = shape.usage(usage)
        yield made
    if shape.usage_at_end:
        yield {**shape.head("text_completion"), "choices": [], "usage": shape.usage(usage)}
