"""What tokens weigh, in integers: the meaning of csrc/masses.h, bit for bit.

A weight is 2 to the power of (logit - largest logit) * scale, made of additions and multiplications alone, each of which rounds
the same everywhere; a mass is the nearest integer to 2^40 times the weight. Sums of integers have no order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quire.ops.blocks import best, pad_to_blocks

ONE = 2.0**40  # the mass of the likeliest token
LOG2_E = 1.4426950408889634
_SHIFT = 1.5 * 2**23  # adding it rounds to an integer, which the low bits then hold
_POWERS = (0.00132647273, 0.00967151299, 0.0555073358, 0.240222424, 0.693147004, 1.0)


def weights_of(row: Tensor, peak: float, scale: float) -> Tensor:
    """float32 weights of logits [N], given the largest."""
    y = (row.float() - peak).mul_(scale)
    shifted = y + _SHIFT
    fraction = y - (shifted - _SHIFT)
    power = fraction * _POWERS[0]
    for coefficient in _POWERS[1:-1]:
        power.add_(coefficient).mul_(fraction)
    power.add_(_POWERS[-1])
    whole = shifted.view(torch.int32).bitwise_left_shift_(23)
    return power.view(torch.int32).add_(whole).view(torch.float32).masked_fill_(y < -126.0, 0.0)


def masses_of(weights: Tensor) -> Tensor:
    """int64 masses [N] of weights."""
    return (weights.double() * ONE).round_().long()


def peaks(logits: Tensor) -> tuple[Tensor, Tensor]:
    found, ids = best(pad_to_blocks(logits.float()))
    return found, ids.masked_fill_(found.isnan(), 0)


def masses(logits: Tensor) -> tuple[Tensor, Tensor]:
    return cross_entropy(logits, None, None)


def cross_entropy(logits: Tensor, targets: Tensor | None, slope: Tensor | None) -> tuple[Tensor, Tensor]:
    highest = peaks(logits)[0]
    totals = []
    for index, peak in enumerate(highest.tolist()):
        if not math.isfinite(peak):
            totals.append(0)
            if slope is not None:
                slope[index] = torch.nan
            continue
        weights = weights_of(logits[index], peak, LOG2_E)
        totals.append(int(masses_of(weights).sum()))
        if slope is not None:
            weights.mul_(ONE / float(totals[-1]))
            weights[targets[index]] -= 1.0
            slope[index] = weights
    return highest, torch.tensor(totals, dtype=torch.int64, device=logits.device)
