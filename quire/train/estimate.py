"""What a run will cost, before a weight is read: trainable parameters, steps, time and peak memory.

Arithmetic on the model's shape; only the machine's matrix rate is measured, for a second. Letters: T tokens, E width, I MLP
width, V vocabulary, R rank.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.errors import DoesNotFit
from quire.plan.memory import ITEM_BYTES, RUNTIME_BYTES, size_text
from quire.plan.training import BYTES_PER_PARAMETER, LEAST_KEPT, activation_bytes, head_bytes
from quire.train.config import TrainingConfig
from quire.train.data import Dataset
from quire.train.memory import SHARE
from quire.train.schedule import Order

if TYPE_CHECKING:
    from quire.models.decoder import CausalLM

# The part of the machine's matrix rate that whole training steps reach.
EFFICIENCY = 0.45
# A rule of thumb: an adapter holds about two bits in a parameter, and a token teaches about one.
BITS_PER_PARAMETER = 2
MATRIX, TRIES = 1024, 5


@dataclass(frozen=True)
class Estimate:
    """trainable, parameters: numbers. tokens: of the whole run. seconds: at EFFICIENCY of the machine's matrix rate."""

    trainable: int
    parameters: int
    steps: int
    tokens: int
    supervised: int
    flops: float
    peak_bytes: int
    weight_bytes: int
    seconds: float | None = None

    def parameters_line(self) -> str:
        """As peft's print_trainable_parameters."""
        share = 100 * self.trainable / self.parameters
        return f"trainable params: {self.trainable:,} || all params: {self.parameters:,} || trainable%: {share:.4f}"

    def lines(self) -> list[str]:
        took = "" if self.seconds is None else f", about {duration(self.seconds)} on this machine"
        return [
            f"{self.steps:,} steps, {self.tokens:,} tokens, {self.supervised:,} of them learned{took}",
            f"Peak memory: about {size_text(self.peak_bytes)} (weights {size_text(self.weight_bytes)})",
        ]

    def warning(self, supervised_rows: int) -> str | None:
        """Where the data has more to say than the adapter can hold."""
        if supervised_rows <= BITS_PER_PARAMETER * self.trainable:
            return None
        return (
            f"{self.trainable:,} trainable parameters are few for {supervised_rows:,} tokens to learn: a larger --r, or "
            "--target-modules all-linear, would hold more."
        )


def estimate(
    model: CausalLM, trainable: int, training: Dataset, validation: Dataset | None, config: TrainingConfig, *,
    dtype: str, weight_bytes: int, memory_free: int,
) -> Estimate:  # fmt: skip
    """model: the tree, on the meta device will do. memory_free: bytes; raises DoesNotFit where they are too few."""
    order = Order(len(training.examples), config)
    numbers = [number for step in range(order.total_steps) for number in order.step(step)]
    examples = [training.examples[number] for number in numbers]
    tokens = sum(example.length for example in examples)
    supervised = sum(one.supervised for example in examples for one in (example, example.rejected) if one is not None)
    shape, item = model.config, ITEM_BYTES[dtype]
    micro = max(training.longest if config.method != "dpo" else 2 * training.longest, min(config.micro_batch_tokens, tokens))
    each = activation_bytes(shape, item, config.r) * micro
    wanted = {"on": LEAST_KEPT, "off": shape.num_layers}.get(config.gradient_checkpointing)
    if wanted is None:
        wanted = max(LEAST_KEPT, min(shape.num_layers, int(SHARE * (memory_free - weight_bytes)) // each))
    inputs = shape.num_layers * micro * shape.hidden_size * item
    peak = weight_bytes + RUNTIME_BYTES + trainable * BYTES_PER_PARAMETER + wanted * each + inputs + head_bytes(shape)
    least = peak - max(0, wanted - LEAST_KEPT) * each
    if least > memory_free:
        raise DoesNotFit(
            f"training needs about {size_text(least)}, and {size_text(memory_free)} are free. Ways out: --micro-batch-tokens "
            f"{max(256, micro // 4)} (if no row is longer), --quantization int8, a smaller --r, or a smaller model."
        )
    return Estimate(
        trainable=trainable,
        parameters=sum(parameter.numel() for parameter in model.parameters()) + trainable,
        steps=order.total_steps,
        tokens=tokens,
        supervised=supervised,
        flops=flops(model, trainable, [len(example.tokens) for example in examples], tokens, supervised),
        peak_bytes=peak,
        weight_bytes=weight_bytes,
    )


def flops(model: CausalLM, trainable: int, lengths: list[int], tokens: int, supervised: int) -> float:
    """What the steps cannot do without: the frozen products there and back (no gradient of their weights), the adapter's
    there and twice back, attention with its scores made twice, the head on supervised rows."""
    shape = model.config
    heads = shape.num_heads * shape.head_dim
    attention = shape.hidden_size * (2 * heads + 2 * shape.num_kv_heads * shape.head_dim)
    feed = 3 * shape.hidden_size * shape.intermediate_size * max(1, shape.num_experts_per_token)
    body = shape.num_layers * (attention + feed)
    scores = 7 * shape.num_layers * heads * sum(length**2 for length in lengths)
    return 4.0 * body * tokens + 6.0 * trainable * tokens + scores + 4.0 * shape.vocab_size * shape.hidden_size * supervised


def matrix_rate(dtype: str) -> float:
    """Multiply-adds, twice, in a second: the median of a few products of torch's at this thread count."""
    import torch

    left, right = (torch.randn(MATRIX, MATRIX).to(getattr(torch, dtype)) for _ in range(2))
    left @ right
    took = []
    for _ in range(TRIES):
        begin = time.perf_counter()
        left @ right
        took.append(time.perf_counter() - begin)
    return 2 * MATRIX**3 / sorted(took)[TRIES // 2]


def duration(seconds: float) -> str:
    """2 h 05 min, 3 min 20 s, 12 s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
