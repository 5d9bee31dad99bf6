"""What a model is trained on: token sequences with a weight for each token. Knows no text and no model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One sequence. weights[i] says how much token i counts in the loss, predicted from what stands before it (0: not at all).

    line: where it comes from (from 1). prompt: how many tokens stand before the last answer. rejected: for DPO, the same
    prompt with the answer that is not wanted.
    """

    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    line: int = 0
    prompt: int = 0
    rejected: Example | None = None

    @property
    def supervised(self) -> int:
        """Tokens that count; the first of a sequence is predicted from nothing and never does."""
        return sum(weight > 0 for weight in self.weights[1:])

    @property
    def length(self) -> int:
        """Tokens that go through the model for it."""
        return len(self.tokens) + (0 if self.rejected is None else len(self.rejected.tokens))
