"""The order of sampling once more, written from the design and not from the code: numpy, float64, one row, no cleverness."""

from __future__ import annotations

from collections import Counter

import numpy as np

from quire.sampling import SamplingRow


def reference_logits(logits: np.ndarray, row: SamplingRow) -> np.ndarray:
    """Logits [V] after masks, bias and penalties."""
    params, x = row.params, logits.astype(np.float64).copy()
    if row.allowed is not None:
        x[~row.allowed.numpy()] = -np.inf
    if params.allowed_token_ids is not None:
        x[[token for token in range(len(x)) if token not in set(params.allowed_token_ids)]] = -np.inf
    for word in row.bad_words:
        start = list(word[:-1])
        if not start or list(row.output_ids)[-len(start) :] == start:
            x[word[-1]] = -np.inf
    if row.position < params.min_tokens:
        x[list(row.stop_ids)] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    for token in set(row.prompt_ids) | set(row.output_ids):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token, count in Counter(row.output_ids).items():
        x[token] -= params.frequency_penalty * count
        x[token] -= params.presence_penalty
    return x


def reference_probabilities(logits: np.ndarray, row: SamplingRow) -> tuple[np.ndarray, np.ndarray]:
    """(probabilities [V], token ids from most to least likely [V]) of the token that `row` draws."""
    params, x = row.params, reference_logits(logits, row)
    order = np.lexsort((np.arange(len(x)), -x))
    if params.temperature == 0:
        p = np.zeros(len(x))
        p[order[0]] = 1.0
        return p, order
    p = _softmax(x / max(params.temperature, 0.01))
    p[p < params.min_p * p.max()] = 0.0
    p /= p.sum()
    if params.top_k > 0:
        p[order[params.top_k :]] = 0.0
        p /= p.sum()
    if params.top_p < 1.0:
        kept = int(np.argmax(np.cumsum(p[order]) >= params.top_p)) + 1
        p[order[kept:]] = 0.0
        p /= p.sum()
    return p, order


def reference_draw(logits: np.ndarray, row: SamplingRow, uniform: float) -> int:
    """The inverse of the cumulative distribution: in order of likelihood under top_k or top_p, else in order of token ids."""
    p, order = reference_probabilities(logits, row)
    if row.params.top_k > 0 or row.params.top_p < 1.0:
        return int(order[np.searchsorted(np.cumsum(p[order]), uniform, side="right")])
    return int(np.searchsorted(np.cumsum(p), uniform, side="right"))


def reference_logprobs(logits: np.ndarray) -> np.ndarray:
    """Raw log-probabilities [V]."""
    return np.log(_softmax(logits.astype(np.float64)))


def _softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    return weights / weights.sum()
