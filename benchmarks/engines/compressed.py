"""Copies of a checkpoint in compressed-tensors' layout, rounded to the nearest: how vLLM is given 8- and 4-bit weights.

w8a8: int8 with a scale for each output, activations int8 with a scale for each token. w4a16: int4 with a scale for each group
of inputs. Embedding and head stay bfloat16, as is usual.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

KINDS = ("w8a8", "w4a16")
GROUP_SIZES = (128, 64, 32)
PER_WORD = 8


def write(source: Path, target: Path, kind: str) -> None:
    """The folder `target`, from the checkpoint in `source`."""
    target.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    size = next(size for size in GROUP_SIZES if config["hidden_size"] % size == 0 == config["intermediate_size"] % size)
    weights: dict[str, Tensor] = {}
    for name, values in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            weights[name] = values
        elif kind == "w8a8":
            weights.update(_eight_bits(name, values.float()))
        else:
            weights.update(_four_bits(name, values.float(), size))
    for path in source.glob("tokenizer*.json"):
        shutil.copy(path, target)
    config["quantization_config"] = _described(kind, size)
    (target / "config.json").write_text(json.dumps(config, indent=1))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def _eight_bits(name: str, values: Tensor) -> dict[str, Tensor]:
    scale = values.abs().amax(1, keepdim=True) / 127
    return {name: (values / scale).round().to(torch.int8), f"{name}_scale": scale.to(torch.bfloat16)}


def _four_bits(name: str, values: Tensor, size: int) -> dict[str, Tensor]:
    """Eight numbers in a word, the first in its lowest bits, each with 8 added."""
    outputs, inputs = values.shape
    groups = values.view(outputs, -1, size)
    scale = groups.abs().amax(2, keepdim=True) / 7
    numbers = ((groups / scale).round().clamp(-8, 7).to(torch.int64) + 8).view(outputs, -1, PER_WORD)
    words = (numbers << (4 * torch.arange(PER_WORD))).sum(-1)
    # The highest number's top bit is the word's sign.
    packed = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return {
        f"{name}_packed": packed.contiguous(),
        f"{name}_scale": scale.squeeze(2).to(torch.bfloat16).contiguous(),
        f"{name}_shape": torch.tensor([outputs, inputs]),
    }


def _described(kind: str, size: int) -> dict[str, Any]:
    eight = kind == "w8a8"
    common = {"type": "int", "symmetric": True}
    weights = {
        **common,
        "num_bits": 8 if eight else 4,
        "dynamic": False,
        "strategy": "channel" if eight else "group",
        "group_size": None if eight else size,
    }
    activations = {**common, "num_bits": 8, "dynamic": True, "strategy": "token"} if eight else None
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if eight else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
