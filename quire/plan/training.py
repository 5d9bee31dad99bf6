"""How much memory a training run needs beside the weights: a torch-free estimate, for the plan, the start log and refusals.

The formulas count the tensors that the backward passes read; they are upper bounds where native kernels keep less. Knows
shapes only. Letters: T tokens of a piece, E width, I MLP width, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.plan.adapters import FLOAT, adapter_bytes

if TYPE_CHECKING:
    from quire.models.config import ModelConfig

# Value, gradient and two moments in float32 for every trainable number.
BYTES_PER_PARAMETER = 16
# Tokens of a piece of a job, unless it says otherwise (quire/service/job_request.py). A longer row makes a longer piece, which
# is seen when the job's file is there, before it begins.
PIECE_TOKENS = 512
# Layers whose activations are there at once where all others are computed a second time.
LEAST_KEPT = 2
# As in quire/train/loss.py, which this torch-free room cannot import; a test compares them.
MOST_LOGITS, MOST_ROWS = 1 << 25, 1024
# float32 tensors of a chunk of logits that live together.
LOGITS_COPIES = 4


@dataclass(frozen=True)
class TrainingBytes:
    """adapter: weights, gradients and moments. activations: of a piece of T tokens, with each layer's input. head: of a chunk
    of labelled rows."""

    adapter: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        return self.adapter + self.activations + self.head


def activation_bytes(model: ModelConfig, item: int, rank: int) -> int:
    """What one layer keeps of one token: residual and norms, q, k, v, attention, gate, up and their product, and A's
    products in float32."""
    width, inner = model.hidden_size, model.intermediate_size * max(1, model.num_experts_per_token)
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    stored = 4 * width + 2 * heads + model.num_heads * model.head_dim + 4 * inner
    return stored * item + 7 * rank * FLOAT


def head_bytes(model: ModelConfig) -> int:
    """Of a chunk of logits and their gradients."""
    return min(MOST_LOGITS, MOST_ROWS * model.vocab_size) * LOGITS_COPIES * FLOAT


def training_bytes(model: ModelConfig, item: int, rank: int, tokens: int) -> TrainingBytes:
    """Of a run of rank R on every linear layer, in pieces of T tokens, with as few activations as will do."""
    inputs = model.num_layers * tokens * model.hidden_size * item
    return TrainingBytes(
        adapter_bytes(model, rank) // FLOAT * BYTES_PER_PARAMETER,
        LEAST_KEPT * tokens * activation_bytes(model, item, rank) + inputs,
        head_bytes(model),
    )
