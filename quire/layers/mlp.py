"""Feed-forward layers."""

from __future__ import annotations

from torch import Tensor, nn

from quire import ops
from quire.layers.linear import Linear, products


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, size: int, inner: int, activation: str, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(size, inner, bias)
        self.up_proj = Linear(size, inner, bias)
        self.down_proj = Linear(inner, size, bias)
        self.activation = activation

    def forward(self, x: Tensor, adapters: Tensor | None = None) -> Tensor:
        gate, up = products(x, adapters, self.gate_proj, self.up_proj)
        return self.down_proj(ops.gated_activation(gate, up, self.activation), adapters)
