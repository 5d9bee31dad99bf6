"""How far a merged model's log-probabilities are from its adapter's on the same text.

A merged model is never bit for bit the adapter beside its base, unless the weights are float32: what the adapter added has
been rounded to the weights' type. This says how much that is. Knows rows of tokens; knows no tokenizer and no folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quire.batch import packed
from quire.lora.parts import Adapter
from quire.lora.slots import Slots
from quire.models.decoder import CausalLM

# Rows of logits at once.
ROWS = 256


@dataclass(frozen=True)
class Scores:
    """Of each token that follows another: its log-probability, and the id of the likeliest one."""

    logprobs: Tensor
    likeliest: Tensor


@dataclass(frozen=True)
class Drift:
    """Absolute differences of log-probabilities in nats. update: how far the adapter itself is from its base on average;
    agreement: share of places with the same likeliest token."""

    mean: float
    largest: float
    update: float
    agreement: float
    tokens: int

    def text(self) -> str:
        return (
            f"log-probabilities of adapter and merged model differ by {self.mean:.2g} on average, {self.largest:.2g} at most "
            f"(the adapter itself moved them by {self.update:.2g} on average); same likeliest token {self.agreement:.2%}; "
            f"{self.tokens} held-out tokens"
        )


@torch.inference_mode()
def scores(
    model: CausalLM, rows: Sequence[Sequence[int]], adapter: Adapter | None = None, advance: Callable[[int], None] | None = None
) -> Scores:
    """Of every token but the first of each row, by `model`, with `adapter` where one is given."""
    slots = None if adapter is None else Slots(model)
    slot = -1
    if slots is not None and adapter is not None:
        slot = slots.take()
        slots.place(slot, adapter)
    found = [_row(model, row, slot) for row in _advancing(rows, advance)]
    if slots is not None:
        slots.give_back(slot)
    return Scores(torch.cat([one.logprobs for one in found]), torch.cat([one.likeliest for one in found]))


def _row(model: CausalLM, row: Sequence[int], slot: int) -> Scores:
    batch = packed([list(row)])
    adapters = torch.full((len(row),), slot, dtype=torch.int32) if slot >= 0 else None
    hidden = model(replace(batch, adapters=adapters))
    logprobs, likeliest = [], []
    for start in range(0, len(row) - 1, ROWS):
        stop = min(start + ROWS, len(row) - 1)
        logits = model.logits(hidden[start:stop], None if adapters is None else adapters[start:stop])
        logs = torch.log_softmax(logits.float(), dim=-1)
        logprobs.append(logs.gather(1, batch.tokens[start + 1 : stop + 1, None])[:, 0])
        likeliest.append(logs.argmax(1))
    return Scores(torch.cat(logprobs), torch.cat(likeliest))


def _advancing(rows: Sequence[Sequence[int]], advance: Callable[[int], None] | None) -> Iterator[Sequence[int]]:
    for row in rows:
        yield row
        if advance is not None:
            advance(1)


def drift_between(base: Scores, adapter: Scores, merged: Scores) -> Drift:
    """All three on the same rows."""
    distance = (adapter.logprobs - merged.logprobs).abs().double()
    return Drift(
        float(distance.mean()),
        float(distance.max()),
        float((adapter.logprobs - base.logprobs).abs().double().mean()),
        float((adapter.likeliest == merged.likeliest).double().mean()),
        len(distance),
    )
