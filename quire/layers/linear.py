"""The one Linear of Quire, with three sockets: `format`, `adapter` and `reduce`.

Quantization, LoRA and tensor parallelism are set into a finished tree from outside; no model file mentions them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from quire import ops

Format = Callable[["Linear", Tensor], Tensor]
Adapter = Callable[[Tensor, Tensor, Tensor], Tensor]
Reduce = Callable[[Tensor], Tensor]


class Linear(nn.Module):
    """y = x W^T + b with W [O, I], the layout of the checkpoint.

    format: how W is stored and multiplied (None: dense). adapter: (x, y, slots) -> y with the rows' LoRA products added.
    reduce: y -> y summed over tensor-parallel ranks.
    """

    format: Format | None = None
    adapter: Adapter | None = None
    reduce: Reduce | None = None

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs  # also known where `format` has taken the weight away
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        if not self.weight.is_meta:  # there torch would import its compiler to fill nothing, and take seconds
            nn.init.uniform_(self.weight, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))

    def forward(self, x: Tensor, adapters: Tensor | None = None) -> Tensor:
        """adapters: as in `Batch`, of these rows."""
        y = ops.linear(x, self.weight, self.bias) if self.format is None else self.format(self, x)
        return self.finish(x, y, adapters)

    def finish(self, x: Tensor, y: Tensor, adapters: Tensor | None) -> Tensor:
        """What the sockets after the product make of y."""
        if self.adapter is not None and adapters is not None:
            y = self.adapter(x, y, adapters)
        return y if self.reduce is None else self.reduce(y)

    def extra_repr(self) -> str:
        return f"{self.inputs} -> {self.outputs}, bias={self.bias is not None}"


def products(x: Tensor, adapters: Tensor | None, *linears: Linear) -> list[Tensor]:
    """[linear(x, adapters) for each]: to the same bits, in one call where their formats know how
    (`format.together(linears, x)`), and in one more for their adapters where these do
    (`adapter.together(sockets, x, ys, adapters)`, None for a linear without)."""
    kinds = {type(linear.format) for linear in linears}
    together = getattr(linears[0].format, "together", None)
    if len(kinds) > 1 or together is None:
        return [linear(x, adapters) for linear in linears]
    ys = together(linears, x)
    sockets = [linear.adapter for linear in linears]
    kinds = {type(socket) for socket in sockets if socket is not None}
    added = getattr(next(iter(kinds)), "together", None) if len(kinds) == 1 else None
    if adapters is None or added is None:
        return [linear.finish(x, y, adapters) for linear, y in zip(linears, ys, strict=True)]
    ys = added(sockets, x, ys, adapters)
    return [y if linear.reduce is None else linear.reduce(y) for linear, y in zip(linears, ys, strict=True)]
