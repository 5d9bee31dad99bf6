"""What a run was begun with, in short: a checkpoint may only be resumed with the same. Knows no file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from quire.lora.parts import Adapter
from quire.train.config import TrainingConfig
from quire.train.examples import Example

# Options that may change between two sittings of one run, for they do not change what is learned.
FREE = frozenset(
    {"gradient_checkpointing", "logging_steps", "save_steps", "save_total_limit", "sample_steps", "sample_prompts"}
)


def fingerprint(
    config: TrainingConfig, training: Sequence[Example], validation: Sequence[Example], adapter: Adapter
) -> dict[str, Any]:
    """Options, digests of the data, shapes of the adapter, and the base."""
    shapes = repr([(name, tuple(tensor.shape)) for name, tensor in adapter.tensors().items()])
    return {
        "options": {name: value for name, value in config.as_dict().items() if name not in FREE},
        "training data": _data(training),
        "validation data": _data(validation),
        "adapter's shapes": hashlib.sha256(shapes.encode()).hexdigest(),
        "base": adapter.base_digest,
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as it was, in words."""
    options = before["options"]
    other = [
        f"{name} is {value!r} and was {options.get(name)!r}"
        for name, value in now["options"].items()
        if name not in options or options[name] != value
    ]
    return other + [f"the {name} is another" for name in now if name != "options" and before.get(name) != now[name]]


def _data(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        for one in (example, example.rejected):
            digest.update(b"" if one is None else f"{one.tokens}{one.weights};".encode())
    return digest.hexdigest()
