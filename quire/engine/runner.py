"""Runs one step on the model: copies, forward, logits. Knows no request and draws nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from quire.batch import KVCache
from quire.engine.builder import Rows, build
from quire.engine.kv import copy_blocks
from quire.models.decoder import CausalLM
from quire.scheduler.step import Step

# Logits of prompt rows are made in pieces: a whole prompt's would be tokens x vocabulary x 4 bytes.
PROMPT_ROWS = 64


class Runner:
    """A model and its cache."""

    def __init__(self, model: CausalLM, kv: KVCache) -> None:
        self.model = model
        self.kv = kv

    @torch.inference_mode()
    def run(self, step: Step, scored: Mapping[int, int]) -> Result:
        """Compute the step. `scored` as in `builder.build`."""
        copy_blocks(self.kv, step.copies)
        batch, rows = build(step, self.kv, scored)
        hidden = self.model(batch)
        logits = self.model.logits(hidden[: rows.num_drawn]) if rows.num_drawn else hidden.new_empty(0, 0)
        return Result(self.model, rows, hidden, logits)


class Result:
    """What a step has computed. logits: float32 [rows.num_drawn, V], placed as `rows.draws` says."""

    def __init__(self, model: CausalLM, rows: Rows, hidden: Tensor, logits: Tensor) -> None:
        self.rows = rows
        self.logits = logits
        self._model, self._hidden = model, hidden

    @torch.inference_mode()
    def prompt_logits(self) -> Iterator[tuple[int, int, Tensor]]:
        """(sequence, position, logits [n, V]) pieces of the prompt rows: row i predicts the token at position + i + 1."""
        for chunk, place, position, count in self.rows.prompt:
            for start in range(0, count, PROMPT_ROWS):
                size = min(PROMPT_ROWS, count - start)
                yield chunk.sequence, position + start, self._model.logits(self._hidden[place + start : place + start + size])
