"""From logits to the weights that are drawn from: temperature, min_p, top_k, top_p, in this order.

A weight is exp((logit - largest logit) / temperature): 1 for the most likely token, and never normalised, since a
draw needs only ratios. The rows are padded to whole blocks with -inf (weight 0). This file knows numbers per row, not
requests.

Rules. min_p: a token stays if its probability is at least min_p times that of the most likely token, after
temperature. top_k: exactly k tokens stay; of equal logits the lowest token ids (vLLM keeps all that tie with the
k-th). top_p: the smallest set of most likely tokens whose mass reaches top_p of what min_p and top_k have left, at
least one token.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from quire.sampling.blocks import largest
from quire.sampling.draw import draw_in_given_order

LEAST_TEMPERATURE = 0.01  # vLLM raises 0 < temperature < 0.01 to this, where exp would leave nothing but zeros and ones
QUICK = 128  # most nuclei are smaller than this; a larger one takes the row-by-row path
STEP = 3.0  # nats by which the row-by-row path looks deeper each time
MARGIN = 1e-6  # more than any rounding of a mass; it costs a few candidates and decides nothing


def temper(logits: Tensor, peak: Tensor, temperature: Tensor) -> Tensor:
    """Weights [R, N] in [0, 1] of padded logits [R, N], given the largest logit and the temperature of each row [R]."""
    scaled = (logits - peak.unsqueeze(1)).div_(temperature.clamp(min=LEAST_TEMPERATURE).unsqueeze(1))
    return scaled.exp_()


def drop_below_min_p(weights: Tensor, min_p: Tensor) -> None:
    """Set to zero, in place, every weight [R, N] below min_p [R]; the most likely token has weight 1 and so stays."""
    # A mask in float32: torch compares into bool, and fills by it, several times more slowly.
    weights.mul_(torch.ge(weights, min_p.unsqueeze(1), out=torch.empty_like(weights)))


def keep_top_k(weights: Tensor, top_k: Tensor) -> Tensor:
    """The weights [R, K], best first, with zeros from place top_k [R] on; top_k 0 keeps all."""
    place = torch.arange(weights.shape[1], device=weights.device)
    return weights.masked_fill((top_k.unsqueeze(1) > 0) & (place >= top_k.unsqueeze(1)), 0.0)


def keep_top_p(sums: Tensor, mass: Tensor, top_p: Tensor) -> Tensor:
    """How many places [R] of the running sums [R, K], best first, it takes to reach top_p of `mass` [R]; at least one."""
    kept = torch.searchsorted(sums, (top_p * mass).unsqueeze(1)).squeeze(1) + 1
    return kept.clamp(max=sums.shape[1])


def draw_filtered(logits: Tensor, weights: Tensor, masses: Tensor, top_k: Tensor, top_p: Tensor, uniforms: Tensor) -> Tensor:
    """Token ids [R] drawn after top_k (0 is off) and top_p (1 is off), in order of likelihood.

    logits, weights [R, N]; masses [R] of the weights; top_p and uniforms float64. Most rows are decided together on
    their best few tokens, the others one by one. Which way a row takes depends on that row alone, and what it draws
    on neither.
    """
    tokens = torch.empty_like(top_k)
    late = top_k > QUICK
    quick = (~late).nonzero().squeeze(1)
    if len(quick):
        wanted = top_k[quick]
        count = min(logits.shape[1], int(torch.where(wanted > 0, wanted, QUICK).max()))
        whole = len(quick) == len(top_k)  # then indexing would only copy
        ids = largest(logits if whole else logits[quick], count)[1]
        found = (weights if whole else weights[quick]).gather(1, ids)
        tokens[quick], reached = _cut_and_draw(ids, found, masses[quick], wanted, top_p[quick], uniforms[quick])
        late[quick] = ~reached
    for index in late.nonzero().squeeze(1).tolist():
        one = slice(index, index + 1)
        ids = _candidates(logits[index], weights[index], float(masses[index]), int(top_k[index]), float(top_p[index]))
        found = weights[one, ids]
        tokens[one] = _cut_and_draw(ids.unsqueeze(0), found, masses[one], top_k[one], top_p[one], uniforms[one])[0]
    return tokens


def _cut_and_draw(
    ids: Tensor, weights: Tensor, masses: Tensor, top_k: Tensor, top_p: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """(token ids [R], whether the row's candidates were enough [R]) from candidates [R, K], best first."""
    sums = keep_top_k(weights, top_k).double().cumsum(-1)
    mass = torch.where(top_k > 0, sums[:, -1], masses)
    kept = keep_top_p(sums, mass, top_p)
    place = draw_in_given_order(sums, kept, uniforms)
    return ids.gather(1, place.unsqueeze(1)).squeeze(1), (top_k > 0) | (sums[:, -1] >= top_p * mass)


def _candidates(logits: Tensor, weights: Tensor, mass: float, top_k: int, top_p: float) -> Tensor:
    """Ids, best first, of all tokens of one row [N] that top_k can keep, or, without top_k, that top_p can keep."""
    if top_k:
        bound = logits.topk(min(top_k, len(logits))).values[-1]
    else:
        bound = logits[weights >= _least_weight(weights, mass, top_p)].min()
    # All that tie with the bound are in, so no token is left out that would precede another.
    ids = (logits >= bound).nonzero().squeeze(1)
    return ids[logits[ids].sort(descending=True, stable=True).indices]


def _least_weight(weights: Tensor, mass: float, top_p: float) -> float:
    """A weight so small that the tokens of at least this weight hold top_p of the mass, and a margin for rounding."""
    # Tokens below `bottom` together weigh less than (1 - top_p) * mass, so looking deeper is never needed.
    bottom = max((1.0 - top_p) * mass / len(weights) / 2, sys.float_info.min)
    least = math.exp(-STEP)
    while least > bottom:
        if float(weights[weights >= least].sum(dtype=torch.float64)) >= top_p * mass * (1.0 + MARGIN):
            return least
        least *= math.exp(-STEP)
    return bottom
