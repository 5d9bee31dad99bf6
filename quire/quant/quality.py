"""How far a model's answers are from another's on the same text: perplexity of both, and the Kullback-Leibler divergence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from quire.batch import packed
from quire.models.decoder import CausalLM

# Rows of logits at once: two of them in float32, and their logarithms.
ROWS = 256


@dataclass(frozen=True)
class Quality:
    """perplexity, also the original's; divergence: mean KL(original || this) in nats; agreement: equal likeliest tokens."""

    perplexity: float
    original: float
    divergence: float
    agreement: float
    tokens: int

    @property
    def increase(self) -> float:
        """How much higher the perplexity is, as a part of the original's."""
        return self.perplexity / self.original - 1

    def text(self) -> str:
        return (
            f"perplexity {self.perplexity:.3f} (original {self.original:.3f}, {self.increase:+.2%}), "
            f"mean KL {self.divergence:.5f} nats, same likeliest token {self.agreement:.1%}, on {self.tokens} held-out tokens"
        )

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "increase": self.increase}


@torch.inference_mode()
def compare(
    original: CausalLM, other: CausalLM, rows: Sequence[Sequence[int]], advance: Callable[[int], None] = lambda rows: None
) -> Quality:
    """Both models on each row of tokens; the first token of a row is given, the others are predicted."""
    losses = torch.zeros(2, dtype=torch.float64)
    divergence, same, count = 0.0, 0, 0
    for row in rows:
        batch = packed([list(row)])
        hidden = [model(batch)[:-1] for model in (original, other)]
        following = torch.tensor(row[1:])
        for start in range(0, len(following), ROWS):
            part = slice(start, start + ROWS)
            logs = [_logarithms(model, one[part]) for model, one in zip((original, other), hidden, strict=True)]
            wanted = following[part, None]
            losses -= torch.stack([one.gather(1, wanted).double().sum() for one in logs])
            divergence += float((logs[0].exp() * (logs[0] - logs[1])).sum(1).double().sum())
            same += int((logs[0].argmax(1) == logs[1].argmax(1)).sum())
        count += len(following)
        advance(1)
    first, second = (math.exp(min(float(loss) / count, 700.0)) for loss in losses)
    return Quality(second, first, divergence / count, same / count, count)


def _logarithms(model: CausalLM, hidden: Tensor) -> Tensor:
    return torch.log_softmax(model.logits(hidden).float(), dim=-1)
