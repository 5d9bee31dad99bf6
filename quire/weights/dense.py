"""The tensors of a checkpoint one after the other, for a reader that wants dense ones: as they are stored, or calculated from
the parts of quantized linears. Their names and shapes are known beforehand, so that a file's header can be written first.

Letters: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from quire.errors import ModelError
from quire.models.decoder import CausalLM
from quire.quant import stored
from quire.quant.packing import Packing, unused
from quire.quant.scheme import Scheme
from quire.weights.files import checkpoint_files, tensor_headers
from quire.weights.kv_scales import is_kv_scale
from quire.weights.tensors import TYPES, stored_tensors

Parts = dict[str, tuple[str, Tensor]]  # name in the files and tensor, by what a name ends with


class StoredTensors:
    """A dense checkpoint's tensors, as they are."""

    def __init__(self, folder: Path) -> None:
        self.paths = checkpoint_files(folder)

    def planned(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the files, something of its type and shape) of each tensor, in the order of `tensors`."""
        return self.tensors()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the files, tensor)."""
        for path in self.paths:
            yield from stored_tensors(path)


class DequantizedTensors(StoredTensors):
    """A quantized checkpoint's tensors: what the parts of each quantized linear stand for, float32, under the name that a
    dense file would have, and all others as they are. Scales of activations and of the cache are left out.

    model: its tree, without memory. Raises ModelError where parts are missing or misshapen.
    """

    def __init__(self, folder: Path, model: CausalLM, scheme: Scheme) -> None:
        super().__init__(folder)
        self.model, self.scheme = model, scheme
        wrong = next((path for path in self.paths if path.suffix != ".safetensors"), None)
        if wrong is not None:
            raise ModelError(f"{wrong.name} must be a .safetensors file: quantized weights are read from no other.")
        headers = [(name, header) for path in self.paths for name, header in tensor_headers(path).items()]
        found = [(candidate, header.dtype) for name, header in headers for candidate in model.checkpoint_names(name)]
        self._parts = Packing(model, scheme, torch.float32).expect(found)
        self._wanted: dict[str, int] = {}
        for name in self._parts:
            module = name.rpartition(".")[0]
            self._wanted[module] = self._wanted.get(module, 0) + 1

    def planned(self) -> Iterator[tuple[str, Tensor]]:
        for name, one in self._gathered(self._headers()):
            if isinstance(one, Tensor):
                yield name, one
            else:
                linear = self.model.get_submodule(self._module(next(iter(one.values()))[0]))
                yield name, self._as_filed(name, torch.empty(linear.outputs, linear.inputs, device="meta"))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, one in self._gathered(super().tensors()):
            if isinstance(one, Tensor):
                yield name, one
                continue
            module = self._module(next(iter(one.values()))[0])
            linear = self.model.get_submodule(module)
            parts = {leaf: tensor for leaf, (_, tensor) in one.items()}
            weight = stored.read(module, parts, self.scheme, linear.outputs, linear.inputs)
            yield name, self._as_filed(name, stored.dense(weight))

    def _headers(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor without its numbers, in the order of `stored_tensors`."""
        for path in self.paths:
            for name, header in sorted(tensor_headers(path).items(), key=lambda item: item[1].start):
                yield name, torch.empty(header.shape, dtype=TYPES[header.dtype], device="meta")

    def _gathered(self, entries: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor | Parts]]:
        """Tensors that are dense, and those of a quantized linear together when its last one comes."""
        waiting: dict[str, Parts] = {}
        for name, tensor in entries:
            module = self._module(name)
            if module is None:
                if not unused(name) and not is_kv_scale(name):
                    yield name, tensor
                continue
            parts = waiting.setdefault(module, {})
            parts[name.rpartition(".")[2]] = name, tensor
            if len(parts) == self._wanted[module]:
                del waiting[module]
                yield f"{name.rpartition('.')[0]}.weight", parts

    def _module(self, name: str) -> str | None:
        """The path of the quantized linear that a stored tensor belongs to; None: to none."""
        found = next((one for one in self.model.checkpoint_names(name) if one in self._parts), None)
        return None if found is None else found.rpartition(".")[0]

    def _as_filed(self, name: str, weight: Tensor) -> Tensor:
        """[O, I] as the family's files keep it."""
        return self.model.convert(name, weight).contiguous()
