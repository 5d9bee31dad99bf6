"""What both kinds of answers share: ids, usage, error-free JSON values, and the log-probabilities in their two layouts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from quire.request import LogprobsOfToken
from quire.service.logprobs import LOWEST
from quire.service.requests import TokenLogprob, Usage


@dataclass
class Shape:
    """How one request wants its answer written."""

    id: str
    model: str
    role: str = "assistant"
    token_ids: bool = False
    """Add the token ids themselves."""
    as_token_ids: bool = False
    """Write tokens in logprobs as `token_id:N`."""
    prompt_logprobs: bool = False
    """Report the prompt's log-probabilities in vLLM's layout."""
    cached_tokens: bool = False
    """Report cached tokens."""
    usage_at_end: bool = False
    usage_always: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, kind: str) -> dict[str, Any]:
        """The fields that every answer and every chunk begins with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def usage(self, usage: Usage) -> dict[str, Any]:
        """OpenAI's usage object."""
        made: dict[str, Any] = {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        if self.cached_tokens:
            made["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
        return made

    def token(self, entry: TokenLogprob) -> str:
        """A token's name in logprobs."""
        return f"token_id:{entry.token_id}" if self.as_token_ids else entry.token


def chat_logprobs(shape: Shape, entries: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
    """The layout of chat completions: one object a token."""
    if entries is None:
        return None

    def one(entry: TokenLogprob) -> dict[str, Any]:
        return {"token": shape.token(entry), "logprob": entry.logprob, "bytes": list(entry.bytes)}

    return {"content": [{**one(entry), "top_logprobs": [one(other) for other in entry.top]} for entry in entries]}


def completion_logprobs(
    shape: Shape, entries: Sequence[TokenLogprob] | None, offset: int = 0
) -> tuple[dict[str, Any] | None, int]:
    """The older layout of completions, parallel lists, and the text offset at which the next token begins."""
    if entries is None:
        return None, offset
    offsets = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry.token)
    made = {
        "text_offset": offsets,
        "token_logprobs": [entry.logprob for entry in entries],
        "tokens": [shape.token(entry) for entry in entries],
        "top_logprobs": [_alternatives(shape, entry) for entry in entries],
    }
    return made, offset


def _alternatives(shape: Shape, entry: TokenLogprob) -> dict[str, float] | None:
    """Alternatives by name, always with the token itself; None for a first prompt token, which nothing precedes."""
    if entry.logprob is None:
        return None
    made: dict[str, float] = {}
    for other in (*entry.top, entry):
        made.setdefault(shape.token(other), other.logprob if other.logprob is not None else LOWEST)
    return made


def prompt_logprobs(positions: Sequence[LogprobsOfToken | None] | None) -> list[dict[str, Any] | None] | None:
    """vLLM's layout of a prompt's log-probabilities: token id -> value, rank and text."""
    if positions is None:
        return None
    return [
        None
        if at is None
        else {
            str(token): {
                "logprob": max(found.logprob, LOWEST),
                "rank": found.rank,
                "decoded_token": found.decoded_token,
            }
            for token, found in at.items()
        }
        for at in positions
    ]
