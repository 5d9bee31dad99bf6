"""The head and the cross-entropy of labelled rows, in chunks: each chunk's gradient is made while its logits are there.

Letters: R labelled rows, E width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.models.decoder import CausalLM

# Logits that exist at once.
MOST_LOGITS = 1 << 23
LEAST_ROWS = 16


@dataclass
class Scored:
    """Of rows [R]: losses, minus the log-probability of the target, and whether the target was the likeliest.

    gradient [R, E]: of each row's loss with respect to that row; None where it was not asked for.
    """

    losses: Tensor
    right: Tensor
    gradient: Tensor | None


def chunks(model: CausalLM, rows: int) -> list[slice]:
    """The pieces in which so many rows go through the head."""
    size = max(LEAST_ROWS, MOST_LOGITS // model.config.vocab_size)
    return [slice(start, min(rows, start + size)) for start in range(0, rows, size)]


def scored(model: CausalLM, hidden: Tensor, targets: Tensor, adapters: Tensor | None, *, gradient: bool) -> Scored:
    """One chunk. hidden [R, E] as `finish` gave it, targets [R]."""
    with torch.set_grad_enabled(gradient):
        rows = hidden.detach().requires_grad_(gradient)
        losses, right = losses_of(model, rows, targets, adapters)
    found = torch.autograd.grad(losses.sum(), rows)[0] if gradient else None
    return Scored(losses.detach(), right, found)


def losses_of(model: CausalLM, hidden: Tensor, targets: Tensor, adapters: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same through autograd."""
    logits = model.logits(hidden, adapters)
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return losses, logits.detach().argmax(-1) == targets


def score_chunks(
    model: CausalLM, hidden: Tensor, targets: Tensor, adapters: Tensor | None, *, gradient: bool
) -> Iterator[Scored | None]:
    """None after each chunk, the whole at the end."""
    done = []
    for piece in chunks(model, len(hidden)):
        theirs = None if adapters is None else adapters[piece]
        done.append(scored(model, hidden[piece], targets[piece], theirs, gradient=gradient))
        yield None
    found = [one.gradient for one in done if one.gradient is not None]
    yield Scored(
        torch.cat([one.losses for one in done]) if done else hidden.new_zeros(0, dtype=torch.float32),
        torch.cat([one.right for one in done]) if done else torch.zeros(0, dtype=torch.bool),
        torch.cat(found) if found else None,
    )
