"""Which rows a step has, and how large its step is: pure functions of seed and step, so that a resumed run goes on exactly."""

from __future__ import annotations

import functools
import hashlib
import math

from quire.train.config import TrainingConfig


class Order:
    """The rows of each step: every epoch in an order of its own, its last step with what is left."""

    def __init__(self, rows: int, config: TrainingConfig) -> None:
        self.rows, self.per_step, self.seed = rows, config.rows_per_step, config.seed
        self.steps_per_epoch = max(1, math.ceil(rows / self.per_step))
        self.total_steps = config.max_steps or max(1, math.ceil(config.num_train_epochs * self.steps_per_epoch))

    def step(self, step: int) -> list[int]:
        """Numbers of the rows of a step (from 0)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return shuffled(self.rows, self.seed, epoch)[place * self.per_step : (place + 1) * self.per_step]


@functools.lru_cache(maxsize=4)
def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """0 to count - 1 in an order that depends on seed and epoch alone."""
    return sorted(range(count), key=lambda row: hashlib.blake2b(f"{seed}:{epoch}:{row}".encode(), digest_size=16).digest())


def rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """The learning rate of a step (from 0)."""
    warmup = config.warmup(total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total_steps - warmup)
    if config.lr_scheduler_type == "linear":
        return config.learning_rate * max(0.0, 1 - done)
    if config.lr_scheduler_type == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.learning_rate
