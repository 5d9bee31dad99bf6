"""The head and the cross-entropy of labelled rows, in chunks: each chunk's gradient is made while its logits are there.

Letters: R labelled rows, E width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.models.decoder import CausalLM

# Logits that exist at once: at 152,000 tokens 220 rows, so that reading the head's weight is little beside multiplying by it.
MOST_LOGITS = 1 << 25
MOST_ROWS = 1024
LEAST_ROWS = 16
# Of them, those that are looked at together.
IN_CACHE = 1 << 19


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
    size = max(LEAST_ROWS, min(MOST_ROWS, MOST_LOGITS // model.config.vocab_size))
    return [slice(start, min(rows, start + size)) for start in range(0, rows, size)]


def scored(model: CausalLM, hidden: Tensor, targets: Tensor, adapters: Tensor | None, *, gradient: bool) -> Scored:
    """One chunk. hidden [R, E] as `finish` gave it, targets [R].

    Not `ops.head_loss`, which knows the weights of rows beforehand: DPO's follow from the losses of whole sequences, and
    the accuracy wants the logits too.
    """
    # Where logits are the head's product and no more, they are widened row by row, while they are in the cache.
    plain = type(model).logits is CausalLM.logits
    with torch.set_grad_enabled(gradient):
        rows = hidden.detach().requires_grad_(gradient)
        logits = model.lm_head(rows, adapters) if plain else model.logits(rows, adapters)
    losses, right = torch.empty(len(rows)), torch.empty(len(rows), dtype=torch.bool)
    slope = torch.empty_like(logits, requires_grad=False) if gradient else None
    size = max(1, IN_CACHE // logits.shape[1])
    for start in range(0, len(rows), size):
        piece = slice(start, start + size)
        found, wanted = logits.detach()[piece].float(), targets[piece, None]
        right[piece] = found.gather(1, wanted)[:, 0] >= found.amax(-1)
        table = torch.log_softmax(found, dim=-1)
        losses[piece] = -table.gather(1, wanted)[:, 0]
        if slope is not None:  # softmax less one at the target
            slope[piece] = table.exp_().scatter_add_(1, wanted, table.new_full(wanted.shape, -1.0))
    if slope is None:
        return Scored(losses, right, None)
    return Scored(losses, right, torch.autograd.grad(logits, rows, slope)[0])


def losses_of(model: CausalLM, hidden: Tensor, targets: Tensor, adapters: Tensor | None) -> Tensor:
    """The losses through autograd, for heads that are trained themselves."""
    return torch.nn.functional.cross_entropy(model.logits(hidden, adapters), targets, reduction="none")


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
