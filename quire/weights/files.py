"""What a checkpoint folder holds, from headers alone: no torch, no tensor is read.

Safetensors files begin with a JSON header (8 bytes of length, then names, types, shapes and offsets); a PyTorch `.bin` file
is a zip whose entries under `data/` are the storages.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

from quire.errors import ModelError
from quire.models.config import ModelConfig, read_json
from quire.quant.scheme import scheme_of
from quire.quant.sizes import WeightSizes, dense_sizes, estimated_sizes, quantized_sizes

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
BYTES_OF = {"float32": 4, "bfloat16": 2, "float16": 2}
MOST_HEADER_BYTES = 100 << 20


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a safetensors file; `dtype` in the file's spelling. start, size: its bytes after the header."""

    shape: tuple[int, ...]
    dtype: str
    start: int
    size: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def checkpoint_files(folder: Path) -> list[Path]:
    """The weight files of `folder`, shards in order: safetensors if there are any, else PyTorch's. Raises ModelError."""
    for index, single in (
        ("model.safetensors.index.json", "model.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    ):
        if (folder / index).is_file():
            return _shards(folder, index)
        if (folder / single).is_file():
            return [folder / single]
    found = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not found:
        raise ModelError(f"no weights in {str(folder)!r}: no model.safetensors, no pytorch_model.bin, no index of shards.")
    return found


def _shards(folder: Path, index: str) -> list[Path]:
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} in {str(folder)!r} has no weight_map.")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise ModelError(f"{index} in {str(folder)!r} names a file outside its folder: {name!r}.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        some = ", ".join(missing[:5])
        raise ModelError(f"{len(missing)} of {len(names)} weight files are missing in {str(folder)!r}: {some}.")
    return [folder / name for name in names]


def tensor_headers(path: Path) -> dict[str, TensorHeader]:
    """Names, shapes and types of a safetensors file. Raises ModelError if the file is damaged or cut short."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, MOST_HEADER_BYTES):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"it should have {8 + length + end} bytes and has {size}")
        return {
            name: TensorHeader(tuple(entry["shape"]), entry["dtype"], begin, end - begin)
            for name, entry in header.items()
            for begin, end in [entry["data_offsets"]]
        }
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path.name} is damaged or not a safetensors file: {error}.") from None


def data_start(path: Path) -> int:
    """Where the tensors' bytes begin in a safetensors file."""
    with path.open("rb") as file:
        return 8 + int(struct.unpack("<Q", file.read(8))[0])


def weight_sizes(folder: Path, model: ModelConfig) -> WeightSizes:
    """What the weights of `folder` take in memory, as they are and quantized at load. Raises ModelError."""
    paths = checkpoint_files(folder)
    scheme = scheme_of(model.raw, None)
    if any(path.suffix != ".safetensors" for path in paths):
        if scheme is not None:
            raise ModelError(f"the weights in {str(folder)!r} are {scheme.method}: such are read from .safetensors files only.")
        return estimated_sizes(weight_bytes(folder, model.dtype, model.dtype) // BYTES_OF[model.dtype], model)
    tensors = [(name, header.shape, header.dtype) for path in paths for name, header in tensor_headers(path).items()]
    if scheme is not None:
        return quantized_sizes(tensors, scheme, tied=model.tie_word_embeddings)
    return dense_sizes(tensors, tied=model.tie_word_embeddings, transposed=model.model_type == "gpt2")


def weight_bytes(folder: Path, dtype: str, stored: str = "float32") -> int:
    """Bytes that the weights of `folder` take in memory as `dtype`. `stored`: type of a .bin checkpoint's tensors."""
    total = 0
    for path in checkpoint_files(folder):
        if path.suffix == ".safetensors":
            total += sum(header.elements for header in tensor_headers(path).values()) * BYTES_OF[dtype]
        else:
            total += _zip_bytes(path) * BYTES_OF[dtype] // BYTES_OF[stored]
    return total


def _zip_bytes(path: Path) -> int:
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(entry.file_size for entry in archive.infolist() if "/data/" in entry.filename)
    except zipfile.BadZipFile:
        # The format before PyTorch 1.6 (facebook/opt-350m among others): one pickle, about as long as its tensors.
        return path.stat().st_size
