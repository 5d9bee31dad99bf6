"""Are training and serving one model? The same tokens, scored by the training forward and by the serving engine.

The adapter is live in both: in a slot of its own for the one, under its name for the other. Knows no job and no store.
"""

from __future__ import annotations

import uuid
from collections.abc import Generator, Iterable, Sequence
from typing import Any

from quire.lora.parts import Adapter
from quire.lora.request import LoRARequest
from quire.lora.slots import Slots
from quire.request import SamplingParams
from quire.train.examples import Example
from quire.train.passes import Share, score

MOST_ROWS = 8
MOST_TOKENS = 4096


def chosen_rows(examples: Iterable[Example], longest: int) -> list[Example]:
    """The first rows that the engine can score, few enough not to hold anybody up; of a pair the preferred answer."""
    chosen: list[Example] = []
    left = MOST_TOKENS
    for example in examples:
        if len(chosen) == MOST_ROWS or (chosen and len(example.tokens) > left):
            break
        if len(example.tokens) < longest:
            chosen.append(Example(example.tokens, example.weights, example.line, example.prompt))
            left -= len(example.tokens)
    return chosen


def training_scores(slots: Slots, adapter: Adapter, examples: Sequence[Example]) -> Generator[None, None, list[list[float]]]:
    """Log-probabilities of the counted tokens by the training forward, layer by layer. For the thread that runs the model."""
    slot = slots.take()
    try:
        slots.place(slot, adapter)
        found = []
        for example in examples:
            share = Share([example], slot)
            yield from score(slots.model, [share])
            assert share.losses is not None
            found.append((-share.losses).tolist())
        return found
    finally:
        slots.give_back(slot)


async def serving_scores(engine: Any, name: str, examples: Sequence[Example]) -> list[list[float]]:
    """The same by the serving engine, one request a row."""
    found = []
    for example in examples:
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        last = None
        request_id = f"parity-{uuid.uuid4().hex}"
        async for output in engine.generate(list(example.tokens), params, request_id, lora_request=LoRARequest(name)):
            last = output
        assert last is not None
        assert last.prompt_logprobs is not None
        counted = [place for place, weight in enumerate(example.weights) if weight > 0 and place > 0]
        found.append([last.prompt_logprobs[place][example.tokens[place]].logprob for place in counted])
    return found


def compared(training: Sequence[Sequence[float]], serving: Sequence[Sequence[float]], source: str) -> dict[str, Any]:
    """Largest and mean absolute difference."""
    pairs = [pair for one, other in zip(training, serving, strict=True) for pair in zip(one, other, strict=True)]
    apart = [abs(one - other) for one, other in pairs]
    return {
        "max": max(apart, default=0.0),
        "mean": sum(apart) / max(1, len(apart)),
        "tokens": len(apart),
        "rows": len(training),
        "source": source,
    }
