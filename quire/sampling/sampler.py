"""From a batch of logits to one token per row: the steps in their order, and nothing else.

    raw log-probabilities (only where asked)            logprobs.py
    allowed ids and grammar mask                        processors.py
    bad words, min_tokens, logit_bias                   processors.py
    repetition, then frequency and presence penalties   penalties.py
    (temperature 0: the largest logit, lowest id among equals, and done)
    temperature, min_p, top_k, top_p, draw              quire/ops (`draw`), by the numbers of draw.py

A row's token and log-probability depend on that row's logits and on its `SamplingRow`, bit for bit: not on the other
rows, the row's place, their number, or the number of threads. A row that holds NaN or infinity, or whose every token
is forbidden, is reported as corrupted and touches no other row.

This file knows no engine: who draws seeds, who ends requests and what a token means are others' business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quire import ops
from quire.sampling import penalties, processors
from quire.sampling.draw import uniform
from quire.sampling.logprobs import best_tokens, token_logprobs
from quire.sampling.rows import SampledRow, SamplingRow

# Rows are worked off in pieces of about this many logits: a piece's buffers then stay within what malloc keeps (32 MiB)
# instead of being mapped anew for each operation, which on CPU costs more than the arithmetic.
PIECE = 2**22
LEAST_TEMPERATURE = 0.01  # vLLM raises 0 < temperature < 0.01 to this, where exp would leave nothing but zeros and ones


@torch.inference_mode()
def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledRow]:
    """One token for each row of logits [R, V], of any float dtype; the logits are left as they are."""
    assert len(rows) == len(logits)
    drawn: list[SampledRow] = []
    for piece in _pieces(logits):
        drawn += _sample_piece(logits[piece].float(), rows[piece])
    return drawn


@torch.inference_mode()
def score(logits: Tensor, targets: Sequence[int], count: int) -> list[SampledRow]:
    """Raw log-probability, rank and the `count` best alternatives (-1 is all) of given tokens, one per row of logits [R, V]."""
    assert len(targets) == len(logits)
    scored: list[SampledRow] = []
    for piece in _pieces(logits):
        raw = logits[piece].float()
        given = zip(targets[piece], _sound(raw), strict=True)
        rows = [SampledRow(token, corrupted=not sound) for token, sound in given]
        scored += _with_logprobs(raw, rows, [count] * len(rows))
    return scored


@torch.inference_mode()
def top_candidates(logits: Tensor, count: int, temperature: float = 0.0) -> list[tuple[tuple[int, float], ...]]:
    """The `count` most likely (id, log-probability) of each row of logits [R, V], best first, ties by lowest id; for
    beam search.

    A temperature other than 0 (off) divides the logits first. A corrupted row gives ().
    """
    found: list[tuple[tuple[int, float], ...]] = []
    for piece in _pieces(logits):
        raw = logits[piece].float()
        tempered = raw / max(temperature, LEAST_TEMPERATURE) if temperature else raw
        tops = best_tokens(tempered, count)
        found += [top if sound else () for top, sound in zip(tops, _sound(tempered), strict=True)]
    return found


def _sample_piece(raw: Tensor, rows: Sequence[SamplingRow]) -> list[SampledRow]:
    shaped = _shape(raw, rows)
    tokens = _draw(shaped, rows).tolist()
    sound = [token >= 0 for token in tokens]
    if shaped is not raw:  # what was masked may have held NaN or infinity
        sound = [both and own for both, own in zip(sound, _sound(raw), strict=True)]
    taken = zip(tokens, sound, strict=True)
    chosen = [SampledRow(token) if intact else SampledRow(0, corrupted=True) for token, intact in taken]
    return _with_logprobs(raw, chosen, [row.params.logprobs for row in rows])


def _shape(raw: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """The logits [R, V] after masks, bias and penalties; `raw` itself where no row asks for any."""
    if not any(processors.changes_candidates(row) or penalties.has_penalties(row) for row in rows):
        return raw
    logits = raw.clone()
    processors.mask_to_allowed(logits, rows)
    processors.mask_bad_words(logits, rows)
    processors.mask_early_stops(logits, rows)
    processors.add_logit_bias(logits, rows)
    penalties.penalize_repetition(logits, rows)
    penalties.penalize_frequency_and_presence(logits, rows)
    return logits


def _draw(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Token ids [R]; -1 where there is nothing to draw from."""

    def numbers(values: Iterable[float], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(list(values), dtype=dtype, device=logits.device)

    params = [row.params for row in rows]
    return ops.draw(
        logits,
        numbers(max(p.temperature, LEAST_TEMPERATURE) if p.temperature else 0.0 for p in params),
        numbers(p.min_p for p in params),
        numbers((max(p.top_k, 0) for p in params), torch.int64),
        numbers(p.top_p for p in params),
        numbers(uniform(row.seed, row.position) if row.params.temperature else 0.0 for row in rows),
    )


def _with_logprobs(raw: Tensor, chosen: list[SampledRow], counts: Sequence[int | None]) -> list[SampledRow]:
    """The rows with log-probability, rank and alternatives filled in where `counts` asks (not None) and the row is sound."""
    asked = [index for index, row in enumerate(chosen) if counts[index] is not None and not row.corrupted]
    if not asked:
        return chosen
    part = slice(None) if len(asked) == len(chosen) else torch.tensor(asked, device=raw.device)
    tokens = torch.tensor([chosen[index].token for index in asked], device=raw.device)
    described = token_logprobs(raw[part], tokens, [counts[index] for index in asked])
    filled = list(chosen)
    for index, of in zip(asked, described, strict=True):
        filled[index] = replace(chosen[index], logprob=of.logprob, rank=of.rank, top=of.top)
    return filled


def _sound(raw: Tensor) -> list[bool]:
    return ops.peaks(raw)[0].isfinite().tolist()


def _pieces(logits: Tensor) -> Iterator[slice]:
    rows = max(1, PIECE // logits.shape[1])
    for start in range(0, len(logits), rows):
        yield slice(start, start + rows)
