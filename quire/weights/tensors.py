"""The tensors of a checkpoint's files, one after the other, without holding more than one in memory.

Safetensors files are mapped: a large tensor that is used as it is stays in the page cache, one that was converted gives its
pages back at once. `.bin` files go through `torch.load(weights_only=True)`, which cannot run code.
"""

from __future__ import annotations

import mmap
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from quire.errors import ModelError
from quire.weights.files import DTYPE_BYTES, TensorHeader, data_start, tensor_headers

TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
# The system maps all pages of the block of its cache that a touched byte lies in; blocks have at most so many bytes.
LARGEST_BLOCK = 2 << 20


def stored_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of one file. Raises ModelError if it is damaged."""
    return _mapped(path) if path.suffix == ".safetensors" else _unpickled(path)


def _mapped(path: Path) -> Iterator[tuple[str, Tensor]]:
    headers = tensor_headers(path)  # a damaged file is refused with its reason before anything is read
    begin = data_start(path)
    with path.open("rb") as file:
        # Private: nothing writes to it, and nothing could reach the file.
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    for name, header in sorted(headers.items(), key=lambda item: item[1].start):
        size = header.elements * DTYPE_BYTES.get(header.dtype, 0)
        if header.dtype not in TYPES or size != header.size:
            raise ModelError(f"{path.name} is damaged: {name!r} has {header.size} bytes of type {header.dtype}.")
        tensor = _tensor(mapping, begin + header.start, header)
        yield name, tensor
        del tensor
        _give_back(mapping, begin + header.start, size)


def _tensor(mapping: mmap.mmap, start: int, header: TensorHeader) -> Tensor:
    dtype = TYPES[header.dtype]
    if not header.elements:
        return torch.empty(header.shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of buffers that cannot be written
        raw = torch.frombuffer(mapping, dtype=torch.uint8, count=header.size, offset=start)
    # A norm's few numbers must not keep a block of their neighbours in memory, and nothing promises that a file's data begin
    # at a multiple of the type's size.
    if header.size < LARGEST_BLOCK or start % DTYPE_BYTES[header.dtype]:
        raw = raw.clone()
    return raw.view(dtype).view(header.shape)


def _give_back(mapping: mmap.mmap, start: int, size: int) -> None:
    """Let go of a tensor's pages, and its neighbours' that came with them; who reads them gets them from the file again."""
    first = max(0, start - LARGEST_BLOCK) // mmap.PAGESIZE * mmap.PAGESIZE
    last = min(len(mapping), start + size + LARGEST_BLOCK)
    if hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED, first, last - first)


def _unpickled(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ModelError(f"{path.name} cannot be read as plain tensors: {str(error).splitlines()[0]}") from None
    while tensors:
        name = next(iter(tensors))
        tensor = tensors.pop(name)
        if not isinstance(tensor, Tensor):
            raise ModelError(f"{path.name} holds {name!r}, which is not a tensor.")
        yield name, tensor
