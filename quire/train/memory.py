"""How much memory a step keeps, and which layers compute their activations twice so that it finds room.

The formulas are the plan's (quire/plan/training.py). Knows shapes and the machine's free memory, no tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from quire.plan.hardware import probe
from quire.plan.training import activation_bytes

if TYPE_CHECKING:
    from quire.models.decoder import CausalLM

# Of what is free, the share that kept activations may take; the rest is for one layer's work and for others.
SHARE = 0.4


def recomputed_layers(model: CausalLM, runs: Iterable[Any], tokens: int) -> int:
    """How many layers, from the lowest trained one, compute their activations again in the backward pass of so many tokens."""
    runs = list(runs)
    count, wishes = model.config.num_layers, {run.config.gradient_checkpointing for run in runs}
    if wishes == {"on"}:
        return count
    if wishes == {"off"}:
        return 0
    item = next(model.parameters()).element_size()
    rank = max(run.flat.adapter.rank for run in runs)
    each = activation_bytes(model.config, item, rank) * tokens
    return max(0, count - int(SHARE * probe().memory_free) // max(1, each))
