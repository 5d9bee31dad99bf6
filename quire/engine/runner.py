"""Runs one step on the model: copies, forward, logits. Knows no request and draws nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from quire.batch import KVCache
from quire.engine.builder import Rows, build
from quire.engine.kv import copy_blocks
from quire.engine.replay import BASE, Replay
from quire.lora.serving import ServingSlots
from quire.models.decoder import CausalLM
from quire.scheduler.step import Step

# Logits of prompt rows are made in pieces: a whole prompt's would be tokens x vocabulary x 4 bytes.
PROMPT_ROWS = 64


class Runner:
    """A model and its cache. adapters: the slots of the requests' adapters, None where none are served."""

    def __init__(self, model: CausalLM, kv: KVCache, adapters: ServingSlots | None = None) -> None:
        self.model = model
        self.kv = kv
        self.adapters = adapters
        self._forward = Replay(model)

    def sweep(self) -> None:
        """Between two steps: let go of adapters that are no longer in memory."""
        if self.adapters:
            self.adapters.sweep()
            self._forward.forget_slots_but(self.adapters.version)

    @torch.inference_mode()
    def run(self, step: Step, scored: Mapping[int, int]) -> Result:
        """Compute the step. `scored` as in `builder.build`."""
        copy_blocks(self.kv, step.copies)
        slot_of = self.adapters.of({chunk.adapter for chunk in step.chunks}) if self.adapters else None
        batch, rows = build(step, self.kv, scored, slot_of)
        hidden = self._forward(batch, BASE if batch.adapters is None else self.adapters.version)
        slots = None if batch.adapters is None else batch.adapters[batch.logit_rows]
        result = Result(self.model, rows, hidden, slots, hidden.new_empty(0, 0))
        if rows.num_drawn:
            result.logits = result.logits_of(0, rows.num_drawn)
        return result


class Result:
    """What a step has computed. logits: float32 [rows.num_drawn, V], placed as `rows.draws` says."""

    def __init__(self, model: CausalLM, rows: Rows, hidden: Tensor, slots: Tensor | None, logits: Tensor) -> None:
        self.rows = rows
        self.logits = logits
        self._model, self._hidden, self._slots = model, hidden, slots

    def logits_of(self, start: int, stop: int) -> Tensor:
        """Logits of the wanted rows from `start` to `stop`, each through its own adapter."""
        slots = None if self._slots is None else self._slots[start:stop]
        return self._model.logits(self._hidden[start:stop], slots)

    @torch.inference_mode()
    def prompt_logits(self) -> Iterator[tuple[int, int, Tensor]]:
        """(sequence, position, logits [n, V]) pieces of the prompt rows: row i predicts the token at position + i + 1."""
        for chunk, place, position, count in self.rows.prompt:
            for start in range(0, count, PROMPT_ROWS):
                size = min(PROMPT_ROWS, count - start)
                yield chunk.sequence, position + start, self.logits_of(place + start, place + start + size)
