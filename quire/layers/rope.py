"""Rotary position embedding (Su et al. 2021) and its context extensions, each a pure function of the position.

The formulas follow the papers as transformers' `modeling_rope_utils` applies them. Two deviations, on purpose, as there both
depend on the longest sequence of the batch. `dynamic`: a position past the trained length is rotated as step by step decoding
would rotate it. `longrope`: the factors are chosen once, by the longest sequence that is served (as vLLM does).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quire import ops
from quire.layers.rope_config import RopeConfig

# Positions whose angles are computed together: few enough for one thread, so that a position's bits are its own.
BLOCK = 256


class Rope:
    """positions [T] -> (cos, sin), each [T, rotary_dim / 2] float32, out of tables that grow with the longest sequence."""

    def __init__(self, config: RopeConfig) -> None:
        self.config = config
        self.inverse, self.magnitude = _frequencies(config)
        self.tables = (torch.empty(0, len(self.inverse)),) * 2
        self._outgrown: list[tuple[Tensor, Tensor]] = []  # recorded steps may read them still

    def reach(self, length: int) -> None:
        """Make tables for sequences of `length` tokens, and up to the next power of two."""
        known = len(self.tables[0])
        if length <= known:
            return
        end = max(BLOCK, 1 << (length - 1).bit_length())
        blocks = [self._angles(torch.arange(start, start + BLOCK)) for start in range(known, end, BLOCK)]
        self._outgrown.append(self.tables)
        self.tables = tuple(torch.cat([old, *new]) for old, new in zip(self.tables, zip(*blocks, strict=True), strict=True))

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        places = positions[:, None].float()
        inverse = _dynamic(self.config, places, self.inverse) if self.config.kind == "dynamic" else self.inverse
        angles = places * inverse
        return torch.cos(angles) * self.magnitude, torch.sin(angles) * self.magnitude

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: below a length that `reach` was told."""
        cos, sin = self.tables
        return ops.embedding(positions, cos), ops.embedding(positions, sin)


def _exponents(config: RopeConfig) -> Tensor:
    return torch.arange(0, config.rotary_dim, 2, dtype=torch.int64).float() / config.rotary_dim


def _plain(config: RopeConfig) -> Tensor:
    return 1.0 / (config.theta ** _exponents(config))


def _frequencies(config: RopeConfig) -> tuple[Tensor, float]:
    """(inverse frequencies [rotary_dim / 2], factor on cos and sin)."""
    options = config.options
    if config.kind == "linear":
        return _plain(config) / float(options["factor"]), 1.0
    if config.kind == "llama3":
        return _llama3(config), 1.0
    if config.kind == "yarn":
        return _yarn(config)
    if config.kind == "longrope":
        long = options.get("served_length", 0) > _trained_length(options)
        return _longrope(config, "long_factor" if long else "short_factor"), _longrope_magnitude(options)
    return _plain(config), 1.0


def _trained_length(options: Mapping[str, Any]) -> int:
    return int(options.get("original_max_position_embeddings") or options["max_position_embeddings"])


def _dynamic(config: RopeConfig, places: Tensor, inverse: Tensor) -> Tensor:
    """NTK-aware scaling whose base grows with the length; each position as if it were the last one so far."""
    trained, factor, size = float(config.options["max_position_embeddings"]), float(config.options["factor"]), config.rotary_dim
    length = places + 1
    growth = (factor * length / trained - (factor - 1)).clamp_min(1.0)
    base = config.theta * torch.exp(torch.log(growth) * (size / (size - 2)))
    grown = torch.exp(-torch.log(base) * _exponents(config).to(places.device))
    return torch.where(length > trained, grown, inverse)


def _llama3(config: RopeConfig) -> Tensor:
    """Long waves are slowed by `factor`, short ones kept, those between blended (Llama 3.1)."""
    options = config.options
    factor, low, high = (float(options[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    trained = float(_trained_length(options))
    inverse = _plain(config)
    waves = 2 * math.pi / inverse
    blend = (trained / waves - low) / (high - low)
    middle = (1 - blend) * inverse / factor + blend * inverse
    slowed = torch.where(waves > trained / low, inverse / factor, inverse)
    return torch.where((waves <= trained / low) & (waves >= trained / high), middle, slowed)


def _yarn(config: RopeConfig) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023): interpolate slow dimensions, keep fast ones, ramp between, and scale attention."""
    options = config.options
    trained = _trained_length(options)
    factor = float(options.get("factor") or options["max_position_embeddings"] / trained)
    size, fast, slow = config.rotary_dim, float(options.get("beta_fast") or 32), float(options.get("beta_slow") or 1)

    def dimension(rotations: float) -> float:
        return size * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension(fast), dimension(slow)
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = ((torch.arange(size // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)).clamp(0, 1)
    inverse = _plain(config)
    return inverse / factor * ramp + inverse * (1 - ramp), _yarn_magnitude(options, factor)


def _yarn_magnitude(options: Mapping[str, Any], factor: float) -> float:
    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if options.get("attention_factor") is not None:
        return float(options["attention_factor"])
    if options.get("mscale") and options.get("mscale_all_dim"):
        return scale(float(options["mscale"])) / scale(float(options["mscale_all_dim"]))
    return scale(1.0)


def _longrope(config: RopeConfig, name: str) -> Tensor:
    """LongRoPE (Ding et al. 2024): one factor per dimension, another list for long sequences."""
    return 1.0 / (torch.tensor(config.options[name], dtype=torch.float32) * config.theta ** _exponents(config))


def _longrope_magnitude(options: Mapping[str, Any]) -> float:
    if options.get("attention_factor") is not None:
        return float(options["attention_factor"])
    trained = _trained_length(options)
    factor = float(options.get("factor") or options["max_position_embeddings"] / trained)
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
