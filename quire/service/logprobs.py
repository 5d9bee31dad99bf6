"""Log-probabilities of the engine (token id -> Logprob, one mapping a position) as lists of plain TokenLogprob values.

Knows the tokenizer, as texts and bytes of tokens come from it; knows no JSON layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from quire.request import LogprobsOfToken
from quire.service.requests import TokenLogprob

LOWEST = -9999.0
"""JSON has no minus infinity."""


class TokenTexts(Protocol):
    """The two things asked of a tokenizer."""

    def token_text(self, id: int) -> str: ...

    def token_bytes(self, id: int) -> bytes: ...


def of_sample(
    tokenizer: TokenTexts, token_ids: Sequence[int], positions: Sequence[LogprobsOfToken | None], most: int
) -> list[TokenLogprob]:
    """One entry for each token, with at most `most` alternatives (-1: all); a position of None gets no number."""
    return [_of_token(tokenizer, token, at, most) for token, at in zip(token_ids, positions, strict=True)]


def _of_token(tokenizer: TokenTexts, token: int, at: LogprobsOfToken | None, most: int) -> TokenLogprob:
    if at is None:
        return _entry(tokenizer, token, None)
    ranked = sorted(at.items(), key=lambda item: (item[1].rank or 0, -item[1].logprob))
    kept = [(id, found) for id, found in ranked if most == -1 or (found.rank or 0) <= most][: None if most == -1 else most]
    top = tuple(_entry(tokenizer, id, found.logprob) for id, found in kept)
    found = at.get(token)
    return _entry(tokenizer, token, found.logprob if found is not None else LOWEST, top)


def _entry(tokenizer: TokenTexts, token: int, logprob: float | None, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
    return TokenLogprob(
        token_id=token,
        token=tokenizer.token_text(token),
        bytes=tuple(tokenizer.token_bytes(token)),
        logprob=None if logprob is None else max(logprob, LOWEST),
        top=top,
    )
