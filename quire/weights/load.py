"""Puts a checkpoint's tensors into a finished module tree, by name. Every tensor must find its place and every place a tensor.

Linears whose weights are quantized, or shall be, take theirs through the pass (quire/quant/packing.py), tensor by tensor.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from quire.errors import ModelError
from quire.log import logger, progress
from quire.models.decoder import CausalLM
from quire.quant.packing import Packing, unused
from quire.weights.files import checkpoint_files, tensor_headers
from quire.weights.kv_scales import is_kv_scale
from quire.weights.memory import large_blocks_given_back
from quire.weights.tensors import stored_tensors

log = logger(__name__)


def load_weights(model: CausalLM, folder: Path, dtype: torch.dtype, packing: Packing) -> None:
    """Fill `model` (built on the meta device) from the files of `folder`, as `dtype`; `packing` takes the linears it wants.

    Raises ModelError naming tensors that are unknown, missing, of another shape or twice there.
    """
    tied = model.config.tie_word_embeddings
    paths = checkpoint_files(folder)
    parts = packing.expect(_candidates(model, paths))
    places = {name: None for name, _ in model.named_parameters() if name not in packing.replaced} | parts
    filled: set[str] = set()
    unknown: list[str] = []
    left_out = 0
    with progress("Loading weights", sum(path.stat().st_size for path in paths)) as advance, large_blocks_given_back():
        for path in paths:
            for stored, tensor in stored_tensors(path):
                advance(tensor.numel() * tensor.element_size())
                candidates = tuple(model.checkpoint_names(stored))
                name = next((candidate for candidate in candidates if candidate in places), None)
                if name is None and is_kv_scale(stored):
                    continue  # the cache's business
                if name is None:
                    left_out += bool(parts) and unused(stored)
                    if candidates and not (tied and stored.endswith("lm_head.weight")) and not (parts and unused(stored)):
                        unknown.append(stored)
                    continue
                if name in filled:
                    raise ModelError(f"tensor {stored!r} of {path.name} is there twice.")
                if name in parts:
                    packing.take_part(name, tensor)
                else:
                    _place(model, name, model.convert(name, tensor), stored, path, dtype, packing)
                filled.add(name)
    missing = sorted(set(places) - filled)
    if unknown or missing:
        raise ModelError(_mismatch(folder, unknown, missing))
    if left_out:
        log.info("%d scales of activations are not used: activations are scaled as they come", left_out)
    if tied and model.table.format is None:
        model.lm_head.weight = model.table.weight


def _candidates(model: CausalLM, paths: list[Path]) -> list[tuple[str, str]]:
    """(name in the tree, type) of everything that the files' headers tell; a .bin file has none."""
    headers = [tensor_headers(path) for path in paths if path.suffix == ".safetensors"]
    stored = [(name, header.dtype) for file in headers for name, header in file.items()]
    return [(candidate, dtype) for name, dtype in stored for candidate in model.checkpoint_names(name)]


def _place(
    model: CausalLM, name: str, tensor: Tensor, stored: str, path: Path, dtype: torch.dtype, packing: Packing
) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    expected = getattr(module, leaf)
    if tensor.shape != expected.shape:
        raise ModelError(
            f"tensor {stored!r} of {path.name} has shape {list(tensor.shape)}, the configuration says {list(expected.shape)}."
        )
    if leaf == "weight" and packing.take_weight(name, tensor):
        return
    setattr(module, leaf, nn.Parameter(tensor.to(dtype).contiguous(), requires_grad=False))


def _mismatch(folder: Path, unknown: list[str], missing: list[str]) -> str:
    def some(names: list[str]) -> str:
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

    parts = [f"missing: {some(missing)}"] if missing else []
    parts += [f"unknown: {some(unknown)}"] if unknown else []
    return f"the weights in {str(folder)!r} do not match its config.json; {'; '.join(parts)}."
