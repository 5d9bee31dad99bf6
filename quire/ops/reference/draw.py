"""The draw in plain torch: the meaning of csrc/sampling.cpp, token for token. The rules stand at `ops.draw`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from quire.ops.blocks import BLOCK, best, largest, pad_to_blocks
from quire.ops.reference.masses import LOG2_E, masses_of, weights_of

QUICK = 128  # most nuclei are smaller than this; a larger one takes the row-by-row path
_BITS = 53


def draw(logits: Tensor, temperatures: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor, uniforms: Tensor) -> Tensor:
    padded = pad_to_blocks(logits)
    peaks, tokens = best(padded)
    sound = peaks.isfinite()
    tokens[~sound] = -1
    random = (sound & (temperatures != 0)).nonzero().squeeze(1)
    if not len(random):
        return tokens
    padded, peaks, top_k, top_p, uniforms = (x[random] for x in (padded, peaks, top_k, top_p, uniforms))
    masses = _masses(padded, peaks, temperatures[random], min_p[random])
    running = masses.unflatten(-1, (-1, BLOCK)).sum(-1).cumsum(-1)
    drawn = torch.empty_like(random)
    ranked = (top_k > 0) | (top_p < 1.0)
    for part, by_rank in ((ranked.nonzero().squeeze(1), True), ((~ranked).nonzero().squeeze(1), False)):
        if not len(part):
            continue
        if by_rank:
            rules = running[part, -1], top_k[part], top_p[part], uniforms[part]
            drawn[part] = _draw_by_rank(padded[part], masses[part], *rules)
        else:
            drawn[part] = _draw_by_id(masses[part], running[part], uniforms[part])
    tokens[random] = drawn
    return tokens


def _masses(logits: Tensor, peaks: Tensor, temperatures: Tensor, min_p: Tensor) -> Tensor:
    """int64 masses [R, N] of padded logits, zero below min_p; row by row, which stays in the cache."""
    masses = torch.empty(logits.shape, dtype=torch.int64, device=logits.device)
    numbers = zip(peaks.tolist(), temperatures.tolist(), min_p.float().tolist(), strict=True)
    for row, out, (peak, temperature, least) in zip(logits, masses, numbers, strict=True):
        weights = weights_of(row, peak, LOG2_E / temperature)
        if least > 0.0:
            weights.masked_fill_(weights < least, 0.0)
        out.copy_(masses_of(weights))
    return masses


def _draw_by_id(masses: Tensor, running: Tensor, uniforms: Tensor) -> Tensor:
    """Token ids [R] in order of token ids, from masses [R, N] and their running block sums: the block, then the token in it."""
    target = _parts(uniforms, running[:, -1])
    block = torch.searchsorted(running, target, right=True)
    before = torch.where(block > 0, running.gather(1, (block - 1).clamp(min=0)), 0)
    inside = masses.unflatten(-1, (-1, BLOCK)).gather(1, block.unsqueeze(-1).expand(-1, 1, BLOCK)).squeeze(1)
    return (block * BLOCK + torch.searchsorted(inside.cumsum(-1), target - before, right=True)).squeeze(1)


def _draw_by_rank(logits: Tensor, masses: Tensor, totals: Tensor, top_k: Tensor, top_p: Tensor, uniforms: Tensor) -> Tensor:
    """Token ids [R] in order of likelihood. Most rows are decided together on their best few tokens, the others one by one."""
    tokens = torch.empty_like(top_k)
    late = top_k > QUICK
    quick = (~late).nonzero().squeeze(1)
    if len(quick):
        wanted = top_k[quick]
        count = min(logits.shape[1], int(torch.where(wanted > 0, wanted, QUICK).max()))
        ids = largest(logits[quick], count)[1]
        rules = totals[quick], wanted, top_p[quick], uniforms[quick]
        tokens[quick], enough = _cut_and_draw(ids, masses[quick].gather(1, ids), *rules)
        late[quick] = ~enough
    for index in late.nonzero().squeeze(1).tolist():
        one = slice(index, index + 1)
        ids = _candidates(logits[index], masses[index], int(top_k[index])).unsqueeze(0)
        rules = totals[one], top_k[one], top_p[one], uniforms[one]
        tokens[one] = _cut_and_draw(ids, masses[one].gather(1, ids), *rules)[0]
    return tokens


def _cut_and_draw(
    ids: Tensor, masses: Tensor, totals: Tensor, top_k: Tensor, top_p: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """(token ids [R], whether the row's candidates were enough [R]) from candidates [R, K], best first."""
    place = torch.arange(masses.shape[1], device=masses.device)
    sums = masses.masked_fill((top_k.unsqueeze(1) > 0) & (place >= top_k.unsqueeze(1)), 0).cumsum(-1)
    least = _reached(top_p, torch.where(top_k > 0, sums[:, -1], totals))
    last = torch.searchsorted(sums, least).clamp_(max=masses.shape[1] - 1)
    target = _parts(uniforms, sums.gather(1, last).squeeze(1))
    drawn = torch.searchsorted(sums, target, right=True).clamp_(max=masses.shape[1] - 1)
    return ids.gather(1, drawn).squeeze(1), sums[:, -1:].ge(least).squeeze(1)


def _candidates(logits: Tensor, masses: Tensor, top_k: int) -> Tensor:
    """Ids, best first, of all tokens of one row [N] that top_k can keep, or, without top_k, that have a mass."""
    kept = logits >= logits.topk(min(top_k, len(logits))).values[-1] if top_k else masses > 0
    # All that tie with the bound are in, so no token is left out that would precede another.
    ids = kept.nonzero().squeeze(1)
    return ids[logits[ids].sort(descending=True, stable=True).indices]


def _parts(shares: Tensor, masses: Tensor) -> Tensor:
    """floor(share * mass) [R, 1], for shares in [0, 1) of which 53 bits count."""
    return _column([int(share * 2**_BITS) * mass >> _BITS for share, mass in _pairs(shares, masses)], masses)


def _reached(top_p: Tensor, masses: Tensor) -> Tensor:
    """The least mass [R, 1] that reaches top_p of `mass`, at least 1."""
    return _column([max(1, -(-int(share * 2**_BITS) * mass >> _BITS)) for share, mass in _pairs(top_p, masses)], masses)


def _pairs(shares: Tensor, masses: Tensor) -> Iterable[tuple[float, int]]:
    return zip(shares.tolist(), masses.tolist(), strict=True)


def _column(numbers: list[int], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=like.device).unsqueeze(1)
