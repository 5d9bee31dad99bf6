"""A model's folder, written as a whole or not at all: files of weights, config.json, and what else a reader needs.

Knows no arithmetic: tensors come from an iterator, one after the other.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from quire.errors import ConfigError
from quire.weights.tensors import TYPES

SHARD_BYTES = 4 << 30
# What a folder may hold beside weights that a reader of the new one needs.
COPIED = (".json", ".txt", ".model", ".jinja", ".md")
NOT_COPIED = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")
_NAMES_OF_TYPES = {dtype: name for name, dtype in TYPES.items()}


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
    names = shard_names(len(files))
    _write_index(folder, {name: names[number] for name, number in places.items()}, total)
    for path, name in zip(files, names, strict=True):
        path.rename(folder / name)
    copy_companions(source, folder)
    original = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**original, "quantization_config": config}, indent=2) + "\n")


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written: known before it is there, so that a file's header can be written first."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def stream_weights(folder: Path, planned: Sequence[Planned], tensors: Iterator[Tensor], most: int = SHARD_BYTES) -> None:
    """The tensors, in the order that was planned, in files of at most `most` bytes (one tensor at least), with one of them
    in memory at a time."""
    shards: list[list[Planned]] = []
    held = 0
    for one in planned:
        if not shards or held + one.size > most:
            shards.append([])
            held = 0
        shards[-1].append(one)
        held += one.size
    names = shard_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            file.write(_header(shard))
            for one in shard:
                tensor = next(tensors)
                assert (tensor.dtype, tuple(tensor.shape)) == (one.dtype, one.shape), one.name
                file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
                del tensor
    places = {one.name: name for name, shard in zip(names, shards, strict=True) for one in shard}
    _write_index(folder, places, sum(one.size for one in planned))


def _header(shard: Sequence[Planned]) -> bytes:
    """The beginning of a safetensors file with these tensors; spaces let the data begin at a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for one in shard:
        end = start + one.size
        entries[one.name] = {"dtype": _NAMES_OF_TYPES[one.dtype], "shape": list(one.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def shard_names(count: int) -> list[str]:
    """What Hugging Face calls `count` files of weights."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _write_index(folder: Path, places: Mapping[str, str], total: int) -> None:
    """places: the file of each tensor; `total` bytes in all. A single file needs no index."""
    if len(set(places.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def copy_companions(source: Path, folder: Path, *, leave_out: Sequence[str] = ()) -> None:
    """Tokenizer, template, generation defaults, card: what a reader of a model needs beside weights and config.json."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name.endswith(COPIED) and path.name not in (*NOT_COPIED, *leave_out):
            shutil.copyfile(path, folder / path.name)


def _to_disk(path: Path) -> None:
    """So that a loss of power cannot leave a name without its contents."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
