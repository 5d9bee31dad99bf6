"""An adapter in memory: for each module what it adds or replaces. Knows no file and no slot.

Letters: R rank, I inputs, O outputs, V vocabulary, E width, N tokens.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from quire.lora.config import LoraConfig

# The tensors of a part, in the order that digests and optimizers take them.
TENSORS = ("a", "b", "b_bias", "magnitude", "bias", "weight", "tokens")


@dataclass(frozen=True, eq=False)
class ModulePart:
    """What an adapter has for one linear, embedding or norm; float32, None where it has nothing of that kind.

    a [R, I] and b [R, O] (B transposed) with their scale; b_bias [O], which is added to B's product before the scale.
    Of an embedding a is [R, V] and b [R, E]. magnitude [O]: the row norms of DoRA. bias [O]: in place of the base's.
    weight: in place of the base's, of its shape. tokens [N, E]: rows `token_ids` of the table, in place of the base's.
    embedding: whether the module is one.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    b_bias: Tensor | None = None
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    weight: Tensor | None = None
    tokens: Tensor | None = None
    token_ids: tuple[int, ...] = ()
    embedding: bool = False

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]

    @property
    def plain(self) -> bool:
        """Whether A and B are all there is."""
        return self.a is not None and all(getattr(self, name) is None for name in TENSORS[2:])

    @property
    def trainable(self) -> bool:
        return any(tensor.requires_grad for _, tensor in self.tensors())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in TENSORS:
            tensor = getattr(self, name)
            if tensor is not None:
                yield name, tensor


@dataclass(frozen=True, eq=False)
class Adapter:
    """parts by module path, sorted. Trainable where its tensors require gradients; then they are written in place.

    written_as: what PEFT calls the modules that it does not call as the tree does (`base.written_name`).
    base_digest: what it was trained on (`base.base_digest`). chat_template: that it was trained with. Both may be unknown.
    """

    config: LoraConfig
    parts: Mapping[str, ModulePart]
    base_digest: str | None = None
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    written_as: Mapping[str, str] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor once, named `module|field`; one that two modules share goes under the first."""
        found: dict[int, tuple[str, Tensor]] = {}
        for module, part in self.parts.items():
            for name, tensor in part.tensors():
                found.setdefault(id(tensor), (f"{module}|{name}", tensor))
        return dict(found.values())

    @property
    def trainable(self) -> bool:
        return any(part.trainable for part in self.parts.values())

    @property
    def rank(self) -> int:
        """The largest rank of a module; 0 where there is no A and B."""
        return max((part.rank for part in self.parts.values()), default=0)

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    @property
    def digest(self) -> str:
        """sha256 of what the adapter computes: its tensors with their places and scales, whatever its name or folder."""
        return self._digest() if self.trainable else self._kept_digest

    @cached_property
    def _kept_digest(self) -> str:
        return self._digest()

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for module, part in sorted(self.parts.items()):
            for name, tensor in part.tensors():
                digest.update(f"{module}|{name}|{tuple(tensor.shape)}|{part.token_ids}|".encode())
                digest.update(struct.pack("<d", part.scale))
                digest.update(tensor.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def frozen(self) -> Adapter:
        """A copy with tensors of its own that no training changes."""
        return self._mapped(lambda tensor: tensor.detach().clone())

    def trained_further(self) -> Adapter:
        """A copy that may be trained."""
        return self._mapped(lambda tensor: tensor.detach().clone().requires_grad_())

    def on(self, device: torch.device) -> Adapter:
        """The same adapter with its tensors there; those that are there already are not copied."""
        return self._mapped(lambda tensor: tensor.to(device))

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Adapter:
        done: dict[int, Tensor] = {}

        def changed(tensor: Tensor) -> Tensor:
            if id(tensor) not in done:
                done[id(tensor)] = change(tensor)
            return done[id(tensor)]

        parts = {
            module: replace(part, **{name: changed(tensor) for name, tensor in part.tensors()})
            for module, part in self.parts.items()
        }
        return replace(self, parts=parts)
