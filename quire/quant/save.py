"""Quantized linears as the layouts that other programs load, and what config.json says of them.

Layouts: see quire/quant/stored.py, which reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quire.quant.nearest import MOST_FP8, MOST_INT8, pack_nibbles, safe
from quire.quant.stored import AWQ_ORDER, PER_WORD

if TYPE_CHECKING:
    from quire.quant.grid import Grid
    from quire.quant.method import Recipe


def awq_parts(numbers: Tensor, grid: Grid) -> dict[str, Tensor]:
    """numbers 0 to 15 [O, I] on a grid, in AWQ's gemm layout."""
    order = list(AWQ_ORDER)
    return {
        "qweight": _words(_shuffled(numbers.t(), order)),
        "qzeros": _words(_shuffled(grid.zeros.t(), order)),
        "scales": grid.scales.t().half().contiguous(),
    }


def gptq_parts(numbers: Tensor, grid: Grid) -> dict[str, Tensor]:
    """The same in GPTQ's first layout, whose zeros are stored less one."""
    return {
        "qweight": _words(numbers).t().contiguous(),
        "qzeros": _words(grid.zeros.t() - 1),
        "scales": grid.scales.t().half().contiguous(),
        "g_idx": (torch.arange(numbers.shape[1]) // grid.size).int(),
    }


def int8_parts(weight: Tensor) -> dict[str, Tensor]:
    """weight [O, I] as int8 with a scale for each output, in the weight's own type."""
    scale = safe(weight.float().abs().amax(1, keepdim=True) / MOST_INT8).to(weight.dtype)
    values = torch.round(weight.float() / scale.float()).clamp(-MOST_INT8, MOST_INT8)
    return {"weight": values.to(torch.int8), "weight_scale": scale}


def fp8_parts(weight: Tensor) -> dict[str, Tensor]:
    """weight [O, I] as float8_e4m3fn with a scale for each output."""
    scale = safe(weight.float().abs().amax(1, keepdim=True) / MOST_FP8).to(weight.dtype)
    values = (weight.float() / scale.float()).clamp(-MOST_FP8, MOST_FP8)
    return {"weight": values.to(torch.float8_e4m3fn), "weight_scale": scale}


def _words(numbers: Tensor) -> Tensor:
    """[A, B] -> int32 [A, B / 8], the first of eight in the lowest bits."""
    return pack_nibbles(numbers.to(torch.uint8).contiguous()).view(torch.int32)


def _shuffled(numbers: Tensor, order: list[int]) -> Tensor:
    return numbers.unflatten(1, (-1, PER_WORD))[..., order].flatten(1)


def quantization_config(recipe: Recipe, dense: Sequence[str]) -> dict[str, Any]:
    """What config.json says of the weights. dense: linears of the layers that stay as they were."""
    if recipe.method == "gptq":
        return {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": recipe.group_size,
            "desc_act": False,
            "static_groups": True,
            "sym": recipe.symmetric,
            "true_sequential": False,
            "lm_head": False,
            "damp_percent": 0.01,
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            **({"dynamic": {f"-:{name.replace('.', chr(92) + '.')}": {} for name in dense}} if dense else {}),
        }
    if recipe.method == "awq":
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": recipe.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(dense) or None,
        }
    kind = {"num_bits": 8, "type": "int" if recipe.method == "int8" else "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**kind, "strategy": "channel", "dynamic": False},
        "input_activations": {**kind, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if recipe.method == "int8" else "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", *dense],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
