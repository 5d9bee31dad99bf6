"""Puts a checkpoint's tensors into a finished module tree, by name. Every tensor must find its place and every place a tensor.

`.bin` files go through `torch.load(weights_only=True)`, which cannot run code.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from quire.errors import ModelError
from quire.log import progress
from quire.models.decoder import CausalLM
from quire.weights.files import checkpoint_files, tensor_headers


def load_weights(model: CausalLM, folder: Path, dtype: torch.dtype) -> None:
    """Fill `model` (built on the meta device) from the files of `folder`, as `dtype`.

    Raises ModelError naming tensors that are unknown, missing, of another shape or twice there.
    """
    places = dict(model.named_parameters())
    tied = model.config.tie_word_embeddings
    filled: set[str] = set()
    unknown: list[str] = []
    paths = checkpoint_files(folder)
    with progress("Loading weights", sum(path.stat().st_size for path in paths)) as advance:
        for path in paths:
            for stored, tensor in _tensors(path):
                advance(tensor.numel() * tensor.element_size())
                candidates = tuple(model.checkpoint_names(stored))
                name = next((candidate for candidate in candidates if candidate in places), None)
                if name is None:
                    if candidates and not (tied and stored.endswith("lm_head.weight")):
                        unknown.append(stored)
                    continue
                if name in filled:
                    raise ModelError(f"tensor {stored!r} of {path.name} is there twice.")
                _place(model, name, model.convert(name, tensor), stored, path, dtype)
                filled.add(name)
    missing = sorted(set(places) - filled)
    if unknown or missing:
        raise ModelError(_mismatch(folder, unknown, missing))
    if tied:
        model.lm_head.weight = model.table.weight


def _place(model: CausalLM, name: str, tensor: Tensor, stored: str, path: Path, dtype: torch.dtype) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    expected = getattr(module, leaf)
    if tensor.shape != expected.shape:
        raise ModelError(
            f"tensor {stored!r} of {path.name} has shape {list(tensor.shape)}, the configuration says {list(expected.shape)}."
        )
    setattr(module, leaf, nn.Parameter(tensor.to(dtype).contiguous(), requires_grad=False))


def _mismatch(folder: Path, unknown: list[str], missing: list[str]) -> str:
    def some(names: list[str]) -> str:
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

    parts = [f"missing: {some(missing)}"] if missing else []
    parts += [f"unknown: {some(unknown)}"] if unknown else []
    return f"the weights in {str(folder)!r} do not match its config.json; {'; '.join(parts)}."


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    if path.suffix == ".safetensors":
        tensor_headers(path)  # a damaged file is refused with its reason before anything is read
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{path.name} is damaged: {error}.") from None
        return
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ModelError(f"{path.name} cannot be read as plain tensors: {str(error).splitlines()[0]}") from None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ModelError(f"{path.name} holds {name!r}, which is not a tensor.")
        yield name, tensor
