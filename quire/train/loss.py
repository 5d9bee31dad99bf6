"""The head and the cross-entropy of labelled rows, in chunks: each chunk's gradient is made while its logits are there.

Letters: R labelled rows, E width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quire import ops
from quire.models.decoder import CausalLM

# Logits that exist at once: at 152,000 tokens 220 rows, so that reading the head's weight is little beside multiplying by it.
MOST_LOGITS = 1 << 25
MOST_ROWS = 1024
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
    size = max(LEAST_ROWS, min(MOST_ROWS, MOST_LOGITS // model.config.vocab_size))
    return [slice(start, min(rows, start + size)) for start in range(0, rows, size)]


def logits_of(model: CausalLM, rows: Tensor, adapters: Tensor | None) -> tuple[Tensor, bool]:
    """The logits of rows [R, E], and whether nothing but the head's product made them: then nobody asks for them again, and
    they stay in its type."""
    plain = type(model).logits is CausalLM.logits
    return (model.lm_head(rows, adapters) if plain else model.logits(rows, adapters)), plain


def scored(model: CausalLM, hidden: Tensor, targets: Tensor, adapters: Tensor | None, *, gradient: bool) -> Scored:
    """One chunk. hidden [R, E] as `finish` gave it, targets [R]."""
    with torch.set_grad_enabled(gradient):
        rows = hidden.detach().requires_grad_(gradient)
        logits, plain = logits_of(model, rows, adapters)
    found = logits.detach()
    slope = None
    if gradient:
        slope = found if plain else torch.empty_like(found)
    logprobs, right = ops.cross_entropy(found, targets, slope)
    if slope is None:
        return Scored(-logprobs, right, None)
    return Scored(-logprobs, right, torch.autograd.grad(logits, rows, slope)[0])


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
