"""Log-probabilities, for serving and for training alike: the same sums, the same formula, and so the same bits.

What an implementation gives is a row's largest logit and the mass of all its tokens (`masses`, in units of 2^-40 of the
likeliest one's); from there on there is one way. Knows no model.

Letters: R rows, V vocabulary, K tokens.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor


def log_probabilities(values: Tensor, peaks: Tensor, masses: Tensor) -> Tensor:
    """Of logits `values` [R, K], given the largest logits and the masses [R] of their rows; NaN where the mass is 0."""
    logs = [math.log(mass / 2**40) if mass else math.nan for mass in masses.tolist()]
    return values.float() - peaks.unsqueeze(1) - torch.tensor(logs, dtype=torch.float32, device=values.device).unsqueeze(1)


def log_softmax_at(kernels: ModuleType, logits: Tensor, ids: Tensor) -> Tensor:
    return log_probabilities(logits.gather(1, ids), *kernels.masses(logits))


def cross_entropy(kernels: ModuleType, logits: Tensor, targets: Tensor, slope: Tensor | None) -> tuple[Tensor, Tensor]:
    values = logits.gather(1, targets.unsqueeze(1))  # before the slope may be written over them
    peaks, masses = kernels.cross_entropy(logits, targets, slope)
    return log_probabilities(values, peaks, masses).squeeze(1), values.squeeze(1).float() >= peaks
