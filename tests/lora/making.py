"""Adapters of the tiny Llama with random A and B, as folders: strong enough to change its tokens."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from quire.assemble import assemble
from quire.lora.adapter import Adapter, write_adapter
from quire.lora.config import LoraConfig
from quire.lora.new import new_adapter
from quire.models.config import read_model_config
from quire.models.decoder import CausalLM

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@cache
def tiny_model(base: Path) -> CausalLM:
    """The tree that adapters are made for."""
    return assemble(base, read_model_config(base), "float32")


def random_adapter(base: Path, seed: int, *, r: int = 4, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> Adapter:
    """An adapter that does something: B is not zero."""
    adapter = new_adapter(tiny_model(base), LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets), seed).frozen()
    for number, part in enumerate(adapter.parts.values()):
        part.b.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(1000 * seed + number))
    return adapter


def save_adapter(folder: Path, base: Path, seed: int, *, files: dict[str, str] | None = None, **options: Any) -> Path:
    """`random_adapter` as PEFT's folder."""
    write_adapter(folder, random_adapter(base, seed, **options), base_name="tiny-llama", extra_files=files)
    return folder
