"""Penalties on tokens that already occurred: repetition (prompt and output), then frequency and presence (output only).

Each function changes the logits [R, V] in place at the tokens that occurred and nowhere else, so the cost follows
the length of the text, not the vocabulary. Formulas: repetition from CTRL (Keskar et al. 2019, as corrected by
Hugging Face: positive logits are divided, others multiplied); frequency and presence from the OpenAI API reference.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from quire.sampling.rows import SamplingRow


def has_penalties(row: SamplingRow) -> bool:
    """Whether any step of this file applies to the row."""
    params = row.params
    return params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0


def penalize_repetition(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Divide positive logits of every token in prompt or output by the penalty, multiply the others."""
    used = [(index, row) for index, row in enumerate(rows) if row.params.repetition_penalty != 1.0]
    if not used:
        return
    texts = [(index, ids) for index, row in used for ids in (row.prompt_ids, row.output_ids)]
    index, token = _occurrences(logits, texts)
    penalty = _numbers(logits, [row.params.repetition_penalty for row in rows])[index]
    values = logits[index, token]
    # A token that occurs twice is written twice with the same value, so the order of writes cannot matter.
    logits[index, token] = torch.where(values > 0, values / penalty, values * penalty)


def penalize_frequency_and_presence(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Subtract frequency_penalty * count, then presence_penalty, from every token in the output."""
    used = [
        (index, row.output_ids)
        for index, row in enumerate(rows)
        if row.params.frequency_penalty != 0.0 or row.params.presence_penalty != 0.0
    ]
    if not used:
        return
    index, token = _occurrences(logits, used)
    width = logits.shape[1]
    place, count = (index * width + token).unique(return_counts=True)
    index, token = place // width, place % width
    frequency = _numbers(logits, [row.params.frequency_penalty for row in rows])[index]
    presence = _numbers(logits, [row.params.presence_penalty for row in rows])[index]
    logits[index, token] = (logits[index, token] - frequency * count) - presence


def _occurrences(logits: Tensor, texts: Iterable[tuple[int, Sequence[int]]]) -> tuple[Tensor, Tensor]:
    """(row index, token id) of every token of every text; ids outside the vocabulary are left out."""
    tokens, indices, lengths = array("q"), [], []
    for index, ids in texts:
        tokens.extend(ids if isinstance(ids, array) and ids.typecode == "q" else array("q", ids))
        indices.append(index)
        lengths.append(len(ids))
    # array -> frombuffer reads a list of ints about ten times faster than torch.tensor.
    token = torch.frombuffer(tokens, dtype=torch.int64) if tokens else torch.empty(0, dtype=torch.int64)
    index = torch.tensor(indices).repeat_interleave(torch.tensor(lengths))
    known = (token >= 0) & (token < logits.shape[1])
    return index[known].to(logits.device), token[known].to(logits.device)


def _numbers(logits: Tensor, values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=logits.dtype, device=logits.device)
