"""The trainable tensors of one run as one flat float32 buffer, with gradients and AdamW's two moments beside it.

A LoRA adapter has hundreds of small tensors; one pass over four long ones replaces a loop over them. The tensors of the
adapter are views into the buffer, so what the optimizer writes is what the model's slots read. Knows no model and no data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quire.lora.parts import Adapter
from quire.train.config import TrainingConfig

# Numbers whose squares are summed at once: a sum of a row is made by one thread, so the norm does not depend on threads.
NORM_ROW = 4096


class FlatParameters:
    """An adapter's tensors, moved into one buffer: first those that learn at the plain rate, then the B matrices (LoRA+).

    adapter: the same adapter with views into the buffer, which require gradients. gradients: {tensor's name: view}.
    """

    def __init__(self, adapter: Adapter) -> None:
        tensors = adapter.tensors()
        names = sorted(tensors, key=lambda name: name.endswith("|b"))
        sizes = [tensors[name].numel() for name in names]
        self.values = torch.empty(sum(sizes))
        self.gradient = torch.zeros_like(self.values)
        self.first, self.second = torch.zeros_like(self.values), torch.zeros_like(self.values)
        self.plain = sum(size for name, size in zip(names, sizes, strict=True) if not name.endswith("|b"))
        self.tensors: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        offset = 0
        for name, size in zip(names, sizes, strict=True):
            shape = tensors[name].shape
            view = self.values[offset : offset + size].view(shape)
            view.copy_(tensors[name].detach())
            self.tensors[name] = view.detach().requires_grad_()
            self.gradients[name] = self.gradient[offset : offset + size].view(shape)
            offset += size
        self.adapter = _with_tensors(adapter, {id(tensors[name]): view for name, view in self.tensors.items()})

    def __len__(self) -> int:
        return len(self.values)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"values": self.values, "first": self.first, "second": self.second}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def norm(self) -> float:
        """The Euclidean length of the gradient."""
        whole = len(self) // NORM_ROW * NORM_ROW
        pieces = [*self.gradient[:whole].view(-1, NORM_ROW).split(NORM_ROW // 4), self.gradient[whole:].view(1, -1)]
        return math.sqrt(sum(float(piece.double().square_().sum(1).sum()) for piece in pieces))

    @torch.no_grad()
    def update(self, config: TrainingConfig, step: int, rate: float) -> float:
        """One step of AdamW (Loshchilov & Hutter 2019) with the gradient as it lies there; gives its norm before clipping."""
        norm = self.norm()
        if not math.isfinite(norm):
            return norm
        if config.max_grad_norm and norm > config.max_grad_norm:
            self.gradient.mul_(config.max_grad_norm / (norm + 1e-6))
        low, high = config.adam_beta1, config.adam_beta2
        self.first.lerp_(self.gradient, 1 - low)
        self.second.mul_(high).addcmul_(self.gradient, self.gradient, value=1 - high)
        scale = self.second.sqrt().div_(math.sqrt(1 - high ** (step + 1))).add_(config.adam_epsilon)
        own = rate / (1 - low ** (step + 1))
        for part, factor in ((slice(0, self.plain), 1.0), (slice(self.plain, None), config.loraplus_lr_ratio)):
            self.values[part].mul_(1 - rate * factor * config.weight_decay)
            self.values[part].addcdiv_(self.first[part], scale[part], value=-own * factor)
        return norm


def _with_tensors(adapter: Adapter, other: Mapping[int, Tensor]) -> Adapter:
    """`adapter` with other tensors in the places of its own, which are known by their ids."""
    parts = {
        module: replace(part, **{name: other[id(tensor)] for name, tensor in part.tensors()})
        for module, part in adapter.parts.items()
    }
    return replace(adapter, parts=parts)
