"""What goes into the sampler and what comes out, one value per row of logits; host data, no arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from quire.request import SamplingParams


@dataclass(frozen=True)
class SamplingRow:
    """One row of logits to draw from.

    seed: already drawn by the engine if the user gave none. position: index of the output token to draw (0 is the
    first); (seed, position) is the whole key of the draw. stop_ids: end-of-sequence and stop token ids, masked until
    min_tokens. bad_words: the token ids of every spelling of every bad word. allowed: a grammar's mask, bool [V],
    True may be drawn. prompt_ids and output_ids: any sequence of ints; `array.array("q")` is the quickest. Ids
    outside the vocabulary are ignored.
    """

    params: SamplingParams
    seed: int
    position: int
    prompt_ids: Sequence[int] = ()
    output_ids: Sequence[int] = ()
    stop_ids: frozenset[int] = frozenset()
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed: Tensor | None = None


@dataclass(frozen=True)
class SampledRow:
    """One chosen token.

    logprob and rank (1 is most likely, ties by lowest id) are those of the raw logits, before any mask, penalty or
    temperature; they are 0.0 and 0 where nobody asked for log-probabilities. top: the most likely (id, raw logprob),
    best first. corrupted: the row held NaN or infinity, or nothing was left to draw from; `token` then means nothing,
    and the engine ends that request alone.
    """

    token: int
    logprob: float = 0.0
    rank: int = 0
    top: tuple[tuple[int, float], ...] = ()
    corrupted: bool = False
