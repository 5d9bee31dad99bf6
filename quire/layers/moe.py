"""Mixture of experts: a router sends each row to a few feed-forward layers (Shazeer et al. 2017; Jiang et al. 2024).

An expert sees its rows only, through operations that are exact by the row, and a row's sum runs over its experts in
ascending order; so the result of a row depends on that row only. The layer knows no balancing of load.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MixtureOfExperts(nn.Module):
    """sum over the `chosen` likeliest experts of probability * expert(x).

    gate: x [T, E] -> router logits [T, number of experts]. normalise: let the chosen probabilities sum to 1.
    """

    def __init__(self, gate: nn.Module, experts: Sequence[nn.Module], chosen: int, normalise: bool) -> None:
        super().__init__()
        self.gate = gate
        self.experts = nn.ModuleList(experts)
        self.chosen, self.normalise = chosen, normalise

    def route(self, x: Tensor, adapters: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [T, E] -> (probabilities float32, experts), each [T, chosen]; of equals the lower expert wins."""
        logits = self.gate(x, adapters).float()
        # Not torch.softmax: see quire/ops/reference/rows.py for which functions are exact by the row.
        odds = torch.exp(logits - logits.amax(-1, keepdim=True))
        probabilities, experts = torch.sort(odds / odds.sum(-1, keepdim=True), dim=-1, descending=True, stable=True)
        probabilities, experts = probabilities[:, : self.chosen], experts[:, : self.chosen]
        if self.normalise:
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        return probabilities, experts

    def forward(self, x: Tensor, adapters: Tensor | None = None) -> Tensor:
        probabilities, chosen = self.route(x, adapters)
        out = torch.zeros_like(x, dtype=torch.float32)
        for index, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == index)
            if len(rows):
                theirs = None if adapters is None else adapters[rows]
                out = out.index_add(0, rows, expert(x[rows], theirs).float() * probabilities[rows, places, None])
        return out.to(x.dtype)
