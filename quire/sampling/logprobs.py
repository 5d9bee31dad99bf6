"""Log-probabilities of given tokens under the raw logits: `ops.log_softmax_at`, whose bits are those of training.

Knows tensors only. Everything is ordered by the logits themselves, larger first and lowest token id first among
equals, so that rank and alternatives agree with each other, with greedy decoding, and for any number of alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quire import ops
from quire.ops.blocks import largest, pad_to_blocks


@dataclass(frozen=True)
class TokenLogprob:
    """One token's natural-log probability, its rank (1 is most likely) and the most likely (id, logprob), best first."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


def token_logprobs(logits: Tensor, tokens: Tensor, counts: list[int]) -> list[TokenLogprob]:
    """For each row of raw float32 logits [R, V]: its token [R], and its `counts` most likely (-1 is all)."""
    described: list[TokenLogprob] = [TokenLogprob(0.0, rank, ()) for rank in _ranks(logits, tokens)]
    for count in set(counts):
        rows = [index for index, wanted in enumerate(counts) if wanted == count]
        part = slice(None) if len(rows) == len(counts) else torch.tensor(rows, device=logits.device)
        own = tokens[part].unsqueeze(1)
        ids = torch.cat([own, _best_ids(logits[part], count)], dim=1) if count else own
        values = ops.log_softmax_at(logits[part], ids)
        for row, (_, *others), (logprob, *theirs) in zip(rows, ids.tolist(), values.tolist(), strict=True):
            described[row] = TokenLogprob(logprob, described[row].rank, tuple(zip(others, theirs, strict=True)))
    return described


def best_tokens(logits: Tensor, count: int) -> list[tuple[tuple[int, float], ...]]:
    """The `count` (or all, if -1) most likely (id, logprob) of each row [R, V], best first, ties by lowest id."""
    ids = _best_ids(logits, count)
    values = ops.log_softmax_at(logits, ids)
    return [tuple(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]


def _best_ids(logits: Tensor, count: int) -> Tensor:
    vocabulary = logits.shape[1]
    # A logit of -inf ties with the padding, but the padding has higher ids and so stays outside the count.
    return largest(pad_to_blocks(logits), vocabulary if count == -1 else min(count, vocabulary))[1]


def _ranks(logits: Tensor, tokens: Tensor) -> list[int]:
    """1 + the number of tokens that precede the given one: a larger logit, or the same logit and a lower id."""
    value = logits.gather(1, tokens.unsqueeze(1))
    # Counted in float32, which torch sums several times faster than bool; exact, as no vocabulary reaches 2**24.
    seen = torch.empty_like(logits)
    above = torch.gt(logits, value, out=seen).sum(-1).long()
    equal = torch.eq(logits, value, out=seen).sum(-1).long()
    ranks = (above + 1).tolist()
    for row in (equal > 1).nonzero().squeeze(1).tolist():
        ranks[row] += int((logits[row, : int(tokens[row])] == value[row]).count_nonzero())
    return ranks
