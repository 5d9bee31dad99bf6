"""What a rotation is made from: plain data, so that reading a model's configuration needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding. kind: default | linear | dynamic | llama3 | yarn | longrope; `options` as in the file."""

    theta: float
    rotary_dim: int
    kind: str = "default"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
