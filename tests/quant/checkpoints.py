"""Quantized checkpoints of the tiny Llama with random numbers, each beside the dense one that it stands for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import write_model
from tests.quant import packers
from tests.quant.test_layouts import AWQ, CT4, GPTQ
from tests.quant.test_scheme import ct

SIZE = 32
CONFIGS: dict[str, dict[str, Any]] = {
    "awq": AWQ,
    "gptq": GPTQ,
    "gptq-v2": {**GPTQ, "checkpoint_format": "gptq_v2"},
    "gptq-act-order": {**GPTQ, "desc_act": True},
    "ct-w4a16": CT4,
    "ct-w8a8": ct("int-quantized", {"num_bits": 8, "dynamic": True}),
    "ct-fp8": ct("float-quantized", type="float", strategy="tensor"),
    "fp8": {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
}


def quantized(kind: str, folder: Path, seed: int = 0, **changes: Any) -> tuple[Path, Path]:
    """(a checkpoint of that kind, the dense one in float32) under `folder`."""
    plain = write_model(folder / "dense", seed, **changes)
    stored = write_model(folder / kind, seed, quantization_config=CONFIGS[kind], **changes)
    dense, parts = load_file(plain / "model.safetensors"), {}
    rng = np.random.default_rng(seed)
    for name in list(dense):
        if not name.endswith("_proj.weight"):
            parts[name] = dense[name]
            continue
        dense[name], own = quantize(kind, dense[name], rng)
        parts |= {f"{name.removesuffix('weight')}{leaf}": tensor for leaf, tensor in own.items()}
    save_file({name: tensor.contiguous() for name, tensor in dense.items()}, plain / "model.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in parts.items()}, stored / "model.safetensors")
    return stored, plain


def quantize(kind: str, weight: Tensor, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """(the matrix that is kept, its stored parts), of a plain rounding in this file's own words."""
    inputs = weight.shape[1]
    if kind in ("ct-w8a8", "ct-fp8", "fp8"):
        one = kind != "ct-w8a8"
        most = 448.0 if one else 127
        scale = weight.abs().max().view(1) / most if one else weight.abs().amax(1, keepdim=True) / most
        values = (weight / scale).to(torch.float8_e4m3fn) if one else torch.round(weight / scale).to(torch.int8)
        extra = {"input_scale": torch.ones(1)} if kind == "fp8" else {}
        return values.float() * scale, {"weight": values, "weight_scale": scale, **extra}
    of_input = packers.natural(inputs, SIZE)
    if kind == "gptq-act-order":
        of_input = rng.permutation(of_input)
    groups = inputs // SIZE
    low = torch.stack([weight[:, of_input == g].amin(1) for g in range(groups)], 1).clamp_max(0)
    high = torch.stack([weight[:, of_input == g].amax(1) for g in range(groups)], 1).clamp_min(0)
    type_of_scales = torch.bfloat16 if kind == "ct-w4a16" else torch.float16
    scales = ((high - low) / 15).to(type_of_scales).float()
    zeros = torch.round(-low / scales).clamp(1, 15)
    numbers = (torch.round(weight / scales[:, of_input]) + zeros[:, of_input]).clamp(0, 15).int().numpy()
    zeros = zeros.int().numpy()
    kept = packers.dense(numbers, zeros, scales, of_input)
    if kind == "awq":
        return kept, packers.awq(numbers, zeros, scales.numpy())
    if kind == "ct-w4a16":
        return kept, packers.pack_quantized(numbers, zeros, scales.numpy())
    return kept, packers.gptq(numbers, zeros, scales.numpy(), of_input, version=2 if kind == "gptq-v2" else 1)


def configured(folder: Path, **changes: Any) -> Path:
    """The folder with other values in its quantization_config."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))
    return folder


def kinds() -> Iterator[str]:
    return iter(CONFIGS)
