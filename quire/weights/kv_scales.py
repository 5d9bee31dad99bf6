"""Scales of a checkpoint's FP8 keys and values, under the names that vLLM and compressed-tensors store them by.

value = stored * scale. They are read apart from the weights: what the cache holds is the engine's choice, not the model's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quire.errors import ModelError
from quire.models.config import ModelConfig
from quire.weights.files import TensorHeader, checkpoint_files, data_start, tensor_headers
from quire.weights.tensors import TYPES

# ...layers.3.self_attn.k_scale | .self_attn.attn.k_scale | .k_proj.k_scale | .k_proj.output_scale | .self_attn.kv_scale (both)
_NAME = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.(?:\w+\.)*(?:(k|v|kv)_scale|(k|v)_proj\.output_scale)$")
_ROWS = {"k": (0,), "v": (1,), "kv": (0, 1)}


def is_kv_scale(name: str) -> bool:
    """Whether a stored tensor is a scale of keys or values."""
    return _NAME.search(name) is not None


def names_kv_scales(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json says that the files have such scales."""
    return bool((raw.get("quantization_config") or {}).get("kv_cache_scheme"))


def stored_kv_scales(folder: Path, config: ModelConfig) -> list[Tensor] | None:
    """For each layer [2, K], float32 (keys, values; 1 where the files say nothing), None if they hold no such scale.

    Raises ModelError for a scale that is no positive number, or not one for a layer or one for each of its heads.
    """
    scales = [torch.ones(2, config.num_kv_heads) for _ in range(config.num_layers)]
    found = False
    for path in checkpoint_files(folder):
        if path.suffix != ".safetensors":
            continue
        for name, header in tensor_headers(path).items():
            match = _NAME.search(name)
            if match is None:
                continue
            found, layer = True, int(match[1])
            if layer >= config.num_layers:
                raise ModelError(f"tensor {name!r} of {path.name} must be of a layer below {config.num_layers}.")
            values = _read(path, name, header, config.num_kv_heads)
            for row in _ROWS[match[2] or match[3]]:
                scales[layer][row] = values
    return scales if found else None


def _read(path: Path, name: str, header: TensorHeader, heads: int) -> Tensor:
    dtype = TYPES.get(header.dtype)
    if dtype is None or header.elements not in (1, heads) or header.size != header.elements * dtype.itemsize:
        raise ModelError(
            f"tensor {name!r} of {path.name} must hold 1 number, or {heads} for the heads, "
            f"got {list(header.shape)} of {header.dtype}."
        )
    with path.open("rb") as file:
        file.seek(data_start(path) + header.start)
        values = torch.frombuffer(bytearray(file.read(header.size)), dtype=dtype).float()
    if not bool(((values > 0) & values.isfinite()).all()):
        raise ModelError(f"tensor {name!r} of {path.name} must be positive, got {values.tolist()}.")
    return values
