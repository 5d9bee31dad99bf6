"""Quantized linears as the layouts that other programs load, and the folder around them, written as a whole or not at all.

Layouts: see quire/quant/stored.py, which reads them.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from quire.errors import ConfigError
from quire.quant.nearest import MOST_FP8, MOST_INT8, pack_nibbles, safe
from quire.quant.stored import AWQ_ORDER, PER_WORD

if TYPE_CHECKING:
    from quire.quant.grid import Grid
    from quire.quant.method import Recipe

SHARD_BYTES = 4 << 30
# What a folder may hold beside weights that a reader of the new one needs.
COPIED = (".json", ".txt", ".model", ".jinja", ".md")
NOT_COPIED = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")


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


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its name at the end, or goes. Raises ConfigError if there is something."""
    refuse_contents(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        yield working
        for path in working.iterdir():
            _to_disk(path)
        working.chmod(0o755)
        if output.is_dir():
            output.rmdir()  # it is empty; a file put there meanwhile makes this fail
        os.replace(working, output)
        _to_disk(output.parent)
    finally:
        shutil.rmtree(working, ignore_errors=True)


def refuse_contents(output: Path) -> None:
    """Raises ConfigError if `output` is something else than an empty folder or nothing."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"output must be a new or an empty folder, got {str(output)!r}, which is not.")


def write_checkpoint(
    source: Path, folder: Path, tensors: Iterator[tuple[str, Tensor]], config: Mapping[str, Any], most: int = SHARD_BYTES
) -> None:
    """Files of weights of at most `most` bytes (one tensor at least), config.json with that quantization_config, and
    whatever else `source` has for a reader."""
    places: dict[str, int] = {}
    shard: dict[str, Tensor] = {}
    files: list[Path] = []

    def close() -> None:
        path = folder / f"part-{len(files)}"
        save_file(shard, path, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, len(files)))
        files.append(path)
        shard.clear()

    total = held = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if shard and held + size > most:
            close()
            held = 0
        # A copy: what comes from a mapped file may be let go before it is written.
        shard[name] = tensor.contiguous().clone()
        held, total = held + size, total + size
    close()
    names = ["model.safetensors"]
    if len(files) > 1:
        names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
        weight_map = {name: names[number] for name, number in sorted(places.items())}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for path, name in zip(files, names, strict=True):
        path.rename(folder / name)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name.endswith(COPIED) and path.name not in NOT_COPIED:
            shutil.copyfile(path, folder / path.name)
    original = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**original, "quantization_config": config}, indent=2) + "\n")


def _to_disk(path: Path) -> None:
    """So that a loss of power cannot leave a name without its contents."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
