"""The first two steps on the logits: what may not be drawn at all, and the bias that the user adds.

Order: allowed token ids and grammar mask; bad words; min_tokens; logit_bias. Each function changes the logits [R, V]
in place, and only in the rows whose request asks for it. Token ids outside the vocabulary are dropped here: written
through they would land in another row, or raise for the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from quire.sampling.rows import SamplingRow

FORBIDDEN = float("-inf")


class Encoder(Protocol):
    """The one thing that `bad_word_ids` needs of a tokenizer."""

    def encode(self, text: str, add_special_tokens: bool) -> Sequence[int]: ...


def changes_candidates(row: SamplingRow) -> bool:
    """Whether any step of this file applies to the row."""
    params = row.params
    return bool(
        row.allowed is not None
        or params.allowed_token_ids is not None
        or row.bad_words
        or (row.stop_ids and row.position < params.min_tokens)
        or params.logit_bias
    )


def mask_to_allowed(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Forbid every token that is not in `allowed_token_ids`, and every token that the grammar refuses."""
    for index, row in enumerate(rows):
        if row.allowed is not None:
            logits[index].masked_fill_(~row.allowed.to(logits.device), FORBIDDEN)
        if row.params.allowed_token_ids is not None:
            ids = [token for token in row.params.allowed_token_ids if 0 <= token < logits.shape[1]]
            kept = logits[index, ids]
            logits[index] = FORBIDDEN
            logits[index, ids] = kept


def mask_bad_words(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Forbid the last token of each bad word whose other tokens end the output (vLLM: the prompt does not count)."""
    _forbid(logits, [(index, token) for index, row in enumerate(rows) for token in _completing_tokens(row)])


def mask_early_stops(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Forbid end-of-sequence and stop tokens while fewer than min_tokens are out."""
    early = [(index, row) for index, row in enumerate(rows) if row.position < row.params.min_tokens]
    _forbid(logits, [(index, token) for index, row in early for token in row.stop_ids])


def add_logit_bias(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Add the user's bias; a forbidden token stays forbidden."""
    entries = [
        (index, token, bias)
        for index, row in enumerate(rows)
        for token, bias in (row.params.logit_bias or {}).items()
        if 0 <= token < logits.shape[1]
    ]
    if entries:
        index, token, bias = zip(*entries, strict=True)
        where = _tensor(logits, index), _tensor(logits, token)
        logits[where] += torch.tensor(bias, dtype=logits.dtype, device=logits.device)


def bad_word_ids(tokenizer: Encoder, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Token ids of every spelling of `words`: at the start of a text, and after a space.

    vLLM (`SamplingParams.update_from_tokenizer`) keeps the second spelling only if it is as long as the first and
    begins otherwise; here every distinct spelling counts, since one that is left out can be written.
    """
    spellings: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word.lstrip(), " " + word.lstrip()):
            spellings[tuple(tokenizer.encode(text, add_special_tokens=False))] = None
    return tuple(ids for ids in spellings if ids)


def _completing_tokens(row: SamplingRow) -> list[int]:
    if not row.bad_words:
        return []
    longest = max(len(word) for word in row.bad_words)
    tail = tuple(row.output_ids[-longest:])
    return [word[-1] for word in row.bad_words if word and _ends_with(tail, word[:-1])]


def _ends_with(tail: tuple[int, ...], start: tuple[int, ...]) -> bool:
    return not start or tail[-len(start) :] == start


def _forbid(logits: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
    pairs = [(index, token) for index, token in pairs if 0 <= token < logits.shape[1]]
    if pairs:
        index, token = zip(*pairs, strict=True)
        logits[_tensor(logits, index), _tensor(logits, token)] = FORBIDDEN


def _tensor(logits: Tensor, numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=logits.device)
