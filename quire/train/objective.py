"""What is minimised: the cross-entropy of supervised tokens, or DPO's loss of pairs. Numbers only, no model.

Both give each labelled row the factor by which its own loss counts, so that one backward pass serves both. Letters: R rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def supervised(losses: Tensor, weights: Tensor, total: float) -> tuple[float, Tensor]:
    """(this part of the step's loss, factors [R]): weighted mean over the supervised tokens of the whole step (`total`)."""
    factors = weights / total
    return float((losses.double() * factors).sum()), factors


def preference(
    losses: Tensor, counts: Sequence[int], reference: Sequence[float], beta: float, total: float
) -> tuple[float, int, Tensor]:
    """(this part of the step's loss, pairs in the right order, factors [R]) of DPO (Rafailov et al. 2023).

    counts: labelled rows of each sequence, preferred and rejected in turns. reference: log-probabilities of the same
    sequences under the base. The loss of a pair is -log sigmoid(beta * margin), total: pairs of the whole step.
    """
    sums = torch.stack([-part.double().sum() for part in losses.split(list(counts))])
    ahead = sums - torch.tensor(reference, dtype=torch.float64)
    margin = beta * (ahead[0::2] - ahead[1::2])
    loss = torch.nn.functional.softplus(-margin).sum() / total
    # d loss / d log-probability is -beta * sigmoid(-margin) for the preferred sequence, and a row's loss is minus its own.
    pull = beta * torch.sigmoid(-margin) / total
    signed = torch.stack([pull, -pull], dim=1).flatten()
    factors = signed.repeat_interleave(torch.tensor(list(counts))).float()
    return float(loss), int((margin > 0).sum()), factors
