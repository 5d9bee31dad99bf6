"""Is there memory for another training run beside what is served? Asked before it begins, from shapes and free memory."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from quire.errors import AdapterError, DoesNotFit, InvalidRequest
from quire.lora.base import sizes
from quire.lora.targets import saved_modules, target_modules
from quire.plan.hardware import probe
from quire.plan.memory import size_text
from quire.plan.training import BYTES_PER_PARAMETER, head_bytes
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
        _estimate(engine, data, hardware.memory_total - engine.plan.serving_bytes)
    except DoesNotFit as error:
        raise JobFailed(f"The job does not fit on this machine: {error}", "out_of_memory", "lora.micro_batch_tokens") from None
    return f"The job waits for memory: {waiting}"


def refuse_what_never_fits(engine: Any, config: TrainingConfig) -> None:
    """Raise InvalidRequest for a job whose numbers alone are more than the machine has beside what is served, whatever its
    rows. What its rows need is looked at when they are read."""
    model = engine.slots.model
    try:
        count = trainable(model, config)
    except AdapterError:
        return  # told as a failed job, with the other faults of the request
    hardware, head = probe(), head_bytes(model.config)
    needed, room = count * BYTES_PER_PARAMETER + head, max(0, hardware.memory_total - engine.plan.serving_bytes)
    if needed > room:
        raise InvalidRequest(
            f"The job needs at least {size_text(needed)}: {size_text(count * BYTES_PER_PARAMETER)} for {count:,} trainable "
            f"numbers with gradients and moments, {size_text(head)} for the head. This machine has {size_text(room)} beside "
            f"what is served ({size_text(hardware.memory_total)} in all). Use a smaller lora.r or fewer lora.target_modules.",
            parameter="lora.r",
            code="out_of_memory",
        )


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
    """Numbers that will be trained: in A and B, and in the modules that are saved whole."""
    lora = config.lora_config()
    factors = sum(lora.rank_of(name) * sum(sizes(model, model.get_submodule(name))) for name in target_modules(lora, model))
    saved = [model.get_submodule(name) for name in saved_modules(lora, model)]
    return factors + sum(math.prod(sizes(model, one)) for one in saved)
