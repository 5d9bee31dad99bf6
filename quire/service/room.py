"""Is there memory for another training run beside what is served? Asked before it begins, from shapes and free memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quire.errors import DoesNotFit
from quire.lora.base import sizes
from quire.lora.targets import target_modules
from quire.plan.hardware import probe
from quire.service.job_data import JobData, JobFailed
from quire.train.config import TrainingConfig
from quire.train.estimate import estimate


def check_room(engine: Any, data: JobData) -> str | None:
    """None if the run finds room; why it must wait otherwise. Raises JobFailed if it never would."""
    hardware = probe()
    try:
        _estimate(engine, data, hardware.memory_free)
        return None
    except DoesNotFit as error:
        waiting = error
    try:
        _estimate(engine, data, hardware.memory_total - engine.plan.needed_bytes)
    except DoesNotFit as error:
        raise JobFailed(f"The job does not fit on this machine: {error}", "out_of_memory", "lora.micro_batch_tokens") from None
    return f"The job waits for memory: {waiting}"


def _estimate(engine: Any, data: JobData, free: int) -> None:
    model = engine.slots.model
    validation = data.validation
    # Steps that are alike need not be counted one by one: one epoch has all lengths.
    config = replace(data.config, max_steps=None, num_train_epochs=1.0)
    estimate(
        model,
        trainable(model, data.config),
        data.training,
        validation,
        config,
        dtype=engine.plan.dtype,
        weight_bytes=0,
        memory_free=free,
    )


def trainable(model: Any, config: TrainingConfig) -> int:
    """Numbers that will be trained in A and B."""
    lora = config.lora_config()
    return sum(lora.rank_of(name) * sum(sizes(model, model.get_submodule(name))) for name in target_modules(lora, model))
