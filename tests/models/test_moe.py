"""The mixture of experts by itself: which experts, in which proportion, and each row on its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quire.layers.linear import Linear
from quire.layers.mlp import GatedMLP
from quire.layers.moe import MixtureOfExperts


class Scale(nn.Module):
    """An expert, or a router, that only multiplies."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, adapters: Tensor | None = None) -> Tensor:
        return x * self.factor


def test_the_likeliest_experts_in_proportion() -> None:
    gate = Scale(1.0)  # the row is its own router logits
    x = torch.tensor([[0.0, 1.0, 2.0], [5.0, 5.0, 5.0]])
    share = torch.softmax(x, -1)
    plain = MixtureOfExperts(gate, [Scale(1.0), Scale(10.0), Scale(100.0)], chosen=2, normalise=False)(x)
    torch.testing.assert_close(plain[0], x[0] * (10 * share[0, 1] + 100 * share[0, 2]))
    torch.testing.assert_close(plain[1], x[1] * (1 / 3 + 10 / 3))  # of equals, the lower ones
    summed = MixtureOfExperts(gate, [Scale(1.0)] * 3, chosen=2, normalise=True)(x)
    torch.testing.assert_close(summed, x)


@torch.no_grad()
def test_a_row_is_the_same_in_any_company() -> None:
    torch.manual_seed(0)
    layer = MixtureOfExperts(Linear(24, 6), [GatedMLP(24, 40, "silu") for _ in range(6)], chosen=3, normalise=True)
    for dtype in (torch.float32, torch.bfloat16):
        layer, x = layer.to(dtype), torch.randn(70, 24).to(dtype)
        expected = layer(x)
        for rows in ([5], [69, 3, 40], list(range(17, 50))):
            assert torch.equal(layer(x[rows]), expected[rows])
        poisoned = x.clone()
        poisoned[7] = torch.nan
        out = layer(poisoned)
        assert out[7].isnan().all()
        others = [row for row in range(70) if row != 7]
        assert torch.equal(out[others], expected[others])
