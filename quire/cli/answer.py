"""One answer as it arrives, wherever it comes from: its text, its counts and its times. Knows no model and no network."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from quire.service.requests import TextRequest


@dataclass
class Answer:
    """Filled in while an answer streams. Times in seconds of the monotonic clock; None until reached."""

    text: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str | None = None
    began: float = field(default_factory=time.monotonic)
    first: float | None = None
    ended: float | None = None

    def add(self, text: str) -> None:
        """More text has come."""
        if text and self.first is None:
            self.first = time.monotonic()
        self.text += text

    def end(self) -> None:
        self.ended = time.monotonic()

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; times in seconds."""
        ended = self.ended or time.monotonic()
        first = self.first or ended
        return {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.tokens,
            "seconds": round(ended - self.began, 4),
            "seconds_to_first_token": round(first - self.began, 4),
            "tokens_per_second": round(self._rate(first, ended), 2),
        }

    def summary(self) -> str:
        """One line of counts and speeds."""
        facts = self.as_dict()
        return (
            f"prompt {self.prompt_tokens} tokens ({self.cached_tokens} cached), first token after "
            f"{facts['seconds_to_first_token']:.2f} s; answer {self.tokens} tokens, {facts['tokens_per_second']:.1f} tokens/s"
        )

    def _rate(self, first: float, ended: float) -> float:
        """Tokens a second after the first one, or over everything if there is only one."""
        if self.tokens > 1 and ended > first:
            return (self.tokens - 1) / (ended - first)
        return self.tokens / max(ended - self.began, 1e-9)


class Speaker(Protocol):
    """Whoever answers: the local engine or a server."""

    name: str

    def stream(self, request: TextRequest, answer: Answer) -> Iterator[str]:
        """Pieces of text as they come, with `answer` filled in. Closing the iterator ends the work behind it."""
        ...

    def close(self) -> None: ...
