"""What an adapter needs to know of its base: sizes, dense values of weights that may be packed, and a digest of the files.

Letters: O outputs, I inputs, V vocabulary, E width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from quire import ops
from quire.layers.embedding import Embedding
from quire.layers.linear import Linear
from quire.layers.norm import Norm
from quire.models.decoder import CausalLM
from quire.weights.files import checkpoint_files, data_start, tensor_headers

# Rows that are made dense at a time.
PIECE = 1024
SAMPLE_BYTES = 4096


def kept_modules(model: CausalLM) -> dict[str, Linear | Embedding | Norm]:
    """The modules that an adapter may have something for, by path: linears, embeddings, and norms that have a weight."""
    kinds = (Linear, Embedding)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds) or (isinstance(module, Norm) and module.weight is not None)
    }


def sizes(model: CausalLM, module: Linear | Embedding | Norm) -> tuple[int, int]:
    """(inputs, outputs): of an embedding the vocabulary and the width, of a norm 1 and the width."""
    if isinstance(module, Norm):
        return 1, len(module.weight)
    if isinstance(module, Linear):
        return module.inputs, module.outputs
    return (model.lm_head.outputs, model.lm_head.inputs) if module.weight is None else tuple(module.weight.shape)


def written_name(model: CausalLM, name: str) -> str:
    """What transformers and PEFT call a module of the tree."""
    here, there = f"{model.prefix}.", f"{model.written_prefix}."
    return there + name.removeprefix(here) if name.startswith(here) else name


def written_names(model: CausalLM, names: Iterable[str]) -> dict[str, str]:
    """Those that are not called as in the tree."""
    return {name: written for name in names if (written := written_name(model, name)) != name}


def dense_rows(module: Linear | Embedding, start: int, stop: int) -> Tensor:
    """Rows start to stop of the base's weight as float32, also where it is packed: [rows, I] or [rows, E]."""
    if module.weight is not None:
        return module.weight[start:stop].float()
    return ops.packed_rows(torch.arange(start, stop), module.format.packed, torch.float32)


def pieces(model: CausalLM, module: Linear | Embedding) -> Iterator[tuple[int, Tensor]]:
    """(first row, dense rows) one after the other, so that no whole dense copy is ever there."""
    inputs, outputs = sizes(model, module)
    rows = inputs if isinstance(module, Embedding) else outputs
    for start in range(0, rows, PIECE):
        yield start, dense_rows(module, start, min(start + PIECE, rows))


def base_digest(folder: Path) -> str:
    """sha256 of a model folder's configuration, its tensors' names, types and shapes, and the first bytes of each.

    Quick, the same wherever the folder lies and however it is divided into files, and another one for other weights.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name in ("_name_or_path", "transformers_version", "use_cache"):
        config.pop(name, None)
    lines = []
    for path in checkpoint_files(folder):
        if path.suffix != ".safetensors":
            with path.open("rb") as file:
                lines.append(f"{path.name} {path.stat().st_size} {hashlib.sha256(file.read(SAMPLE_BYTES)).hexdigest()}")
            continue
        begin = data_start(path)
        with path.open("rb") as file:
            for name, header in tensor_headers(path).items():
                file.seek(begin + header.start)
                sample = hashlib.sha256(file.read(min(header.size, SAMPLE_BYTES))).hexdigest()
                lines.append(f"{name} {header.dtype} {header.shape} {sample}")
    text = json.dumps(config, sort_keys=True) + "\n".join(sorted(lines))
    return hashlib.sha256(text.encode()).hexdigest()
