"""PEFT's adapter folder, read and written. Knows no slot and no server.

What is read is checked whole before it is used: every tensor has its module, every module its tensors, all of them finite.
What is written is complete or not there: a temporary folder beside it, synchronized, then renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from quire.errors import AdapterError, ModelError, did_you_mean
from quire.lora.config import LoraConfig, parse_lora_config
from quire.lora.parts import Adapter, ModulePart
from quire.lora.targets import target_modules
from quire.models.decoder import CausalLM
from quire.weights.tensors import stored_tensors

__all__ = ["Adapter", "ModulePart", "read_adapter", "write_adapter"]

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."


def read_adapter(folder: Path, model: CausalLM, *, allow_pickle: bool = False, max_rank: int | None = None) -> Adapter:
    """The adapter in `folder` for `model`. Raises AdapterError naming the file, the tensor, what is expected and found.

    allow_pickle: read adapter_model.bin where there are no safetensors (plain tensors only, by the operator's leave).
    """
    config = read_config(folder)
    tensors = _tensors(folder, allow_pickle)
    expected = target_modules(config, model)
    parts: dict[str, ModulePart] = {}
    for name in sorted(expected):
        module = model.get_submodule(name)
        keys = {side: f"{PREFIX}{name}.lora_{side}.weight" for side in "AB"}
        for key in keys.values():
            if key not in tensors:
                raise AdapterError(f"{TENSORS} has no {key!r}, which target_modules asks for.", parameter="target_modules")
        a, b = (tensors.pop(key).float() for key in keys.values())
        rank = config.rank_of(name)
        for key, tensor, shape in ((keys["A"], a, (rank, module.inputs)), (keys["B"], b, (module.outputs, rank))):
            if tuple(tensor.shape) != shape:
                raise AdapterError(f"{key!r} has shape {list(tensor.shape)}; expected {list(shape)}.")
            if not torch.isfinite(tensor).all():
                raise AdapterError(f"{key!r} has numbers that are not finite.")
        if max_rank is not None and rank > max_rank:
            raise AdapterError(f"r is {rank}; at most {max_rank} is served (--max-lora-rank).", parameter="r")
        parts[name] = ModulePart(a.contiguous(), b.t().contiguous(), config.scale_of(name))
    if tensors:
        key = next(iter(tensors))
        raise AdapterError(f"{TENSORS} has {key!r}, which fits no target module of this model.{did_you_mean(key, parts)}")
    return Adapter(config, parts)


def read_config(folder: Path) -> LoraConfig:
    """adapter_config.json of `folder`. Raises AdapterError."""
    path = folder / CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"there is no {CONFIG} in {folder.name!r}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{CONFIG} cannot be read: {error}.") from None
    if not isinstance(raw, dict):
        raise AdapterError(f"{CONFIG} is not a JSON object.")
    return parse_lora_config(raw)


def _tensors(folder: Path, allow_pickle: bool) -> dict[str, Tensor]:
    path = folder / TENSORS
    if not path.is_file():
        if not (folder / PICKLE).is_file():
            raise AdapterError(f"there is no {TENSORS} in {folder.name!r}.")
        if not allow_pickle:
            raise AdapterError(f"{PICKLE} is a pickle file, which is not read; convert it to {TENSORS}.")
        path = folder / PICKLE
    try:
        return {name: tensor.clone() for name, tensor in stored_tensors(path)}
    except ModelError as error:
        raise AdapterError(str(error)) from None


def write_adapter(
    folder: Path, adapter: Adapter, *, base_name: str | None = None, extra_files: Mapping[str, str | bytes] | None = None
) -> None:
    """PEFT's folder of `adapter` at `folder`, which must not exist or is replaced whole.

    base_name: what `base_model_name_or_path` says. extra_files: further files by name.
    """
    tensors: dict[str, Tensor] = {}
    for name, part in adapter.parts.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = part.a.detach().cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = part.b.detach().cpu().t().contiguous()
    config = adapter.config.to_json()
    if base_name is not None:
        config["base_model_name_or_path"] = base_name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
        fresh = Path(name) / "new"
        fresh.mkdir()
        save_file(tensors, fresh / TENSORS, metadata={"format": "pt"})
        (fresh / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for extra, content in (extra_files or {}).items():
            (fresh / extra).write_bytes(content.encode() if isinstance(content, str) else content)
        for path in fresh.iterdir():
            _synchronize(path)
        _synchronize(fresh)
        if folder.exists():
            folder.rename(Path(name) / "old")
        fresh.rename(folder)
        _synchronize(folder.parent)
        shutil.rmtree(Path(name) / "old", ignore_errors=True)


def _synchronize(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
