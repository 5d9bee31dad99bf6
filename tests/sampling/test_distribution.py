"""Draws against the exact distribution, over the whole vocabulary: chi-square for each parameter and for combinations.

Seeds are fixed, so a test that passes once passes always. The expected distribution comes from `sampling_reference`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from quire.request import SamplingParams
from quire.sampling import SamplingRow, sample
from quire.sampling.draw import uniform
from tests.sampling.sampling_reference import reference_draw, reference_probabilities

DRAWS = 12_000
VOCABULARY = 200
PROMPT, OUTPUT = [3, 5, 5, 8, 40], [5, 7, 7, 7, 9, 11]

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature 0.5": {"temperature": 0.5},
    "temperature 2": {"temperature": 2.0},
    "min_p": {"min_p": 0.05},
    "top_k": {"top_k": 7},
    "top_k of most": {"top_k": 50},
    "top_p": {"top_p": 0.8},
    "top_p of nearly all": {"top_p": 0.999},
    "repetition": {"repetition_penalty": 1.8},
    "repetition below 1": {"repetition_penalty": 0.7},
    "frequency": {"frequency_penalty": 0.9},
    "presence": {"presence_penalty": -1.5},
    "bias": {"logit_bias": {5: 3.0, 6: -100.0, 60: 2.5}},
    "allowed": {"allowed_token_ids": [1, 2, 3, 5, 7, 11, 13, 60]},
    "min_tokens": {"min_tokens": 10**6, "max_tokens": None},
    "cold and narrow": {"temperature": 0.6, "top_k": 20, "top_p": 0.9},
    "hot and filtered": {"temperature": 1.7, "min_p": 0.02, "top_k": 30, "top_p": 0.95},
    "min_p then top_p": {"min_p": 0.1, "top_p": 0.85},
    "everything": {
        "temperature": 1.3,
        "min_p": 0.01,
        "top_k": 40,
        "top_p": 0.97,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.4,
        "logit_bias": {0: 2.0, 9: 1.0},
        "min_tokens": 10**6,
        "max_tokens": None,
    },
}


def row_of(params: SamplingParams, seed: int, position: int) -> SamplingRow:
    return SamplingRow(
        params, seed, position, PROMPT, OUTPUT, stop_ids=frozenset({2, 12}), bad_words=((4,), (9, 11, 14), (9, 15), (11, 16))
    )


def logits_of(vocabulary: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """The p-value over all tokens; those expected fewer than five times are counted together."""
    assert not counts[probabilities == 0].any(), "a token that cannot be drawn was drawn"
    expected = probabilities * counts.sum()
    often = expected >= 5
    observed = [*counts[often], counts[~often].sum()]
    wanted = [*expected[often], expected[~often].sum()]
    if wanted[-1] < 5:  # too rare even together
        observed[-2:], wanted[-2:] = [sum(observed[-2:])], [sum(wanted[-2:])]
    return 1.0 if len(wanted) < 2 else float(stats.chisquare(observed, wanted).pvalue)


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_exact_distribution(name: str) -> None:
    """Half of the draws differ by seed, as requests do, and half by position, as the tokens of one request do."""
    params, logits = SamplingParams(**CASES[name]), logits_of(VOCABULARY)
    keys = [(draw, 0) for draw in range(DRAWS)] + [(DRAWS + 1, draw) for draw in range(DRAWS)]
    rows = [row_of(params, *key) for key in keys]
    tokens = np.array([row.token for row in sample(logits.expand(len(rows), VOCABULARY), rows)])
    expected, _ = reference_probabilities(logits.numpy(), rows[0])
    for part in (tokens[:DRAWS], tokens[DRAWS:], tokens):
        assert chi_square(np.bincount(part, minlength=VOCABULARY), expected) > 0.001


@pytest.mark.parametrize(
    "vocabulary, spread",
    [(7, 3.0), (128, 3.0), (1000, 0.5), (1000, 3.0), (1000, 12.0), (8192, 3.0), (8192, 0.5), (50257, 2.0)],
)
def test_every_draw_is_the_inverse_of_the_cumulative_distribution(vocabulary: int, spread: float) -> None:
    """Token by token: the same uniform number gives the same token as the reference, whatever way a row takes inside."""
    choices = [
        {},
        {"temperature": 0.7},
        {"min_p": 0.02},
        {"top_k": 40},
        {"top_k": 700},
        {"top_p": 0.9},
        {"top_p": 0.9999},
        {"top_k": 300, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 60, "top_p": 0.95, "min_p": 0.001},
    ]
    rows = [SamplingRow(SamplingParams(**choice), 77, position) for position in range(2) for choice in choices]
    logits = torch.stack([logits_of(vocabulary, seed, spread) for seed in range(len(rows))])
    expected = [reference_draw(x.numpy(), row, uniform(row.seed, row.position)) for x, row in zip(logits, rows, strict=True)]
    assert [row.token for row in sample(logits, rows)] == expected


def test_logits_with_many_ties_are_cut_at_exactly_k() -> None:
    """bfloat16 logits tie all the time: of equal ones, the lowest ids stay."""
    logits = (torch.randn(40, 3000, generator=torch.Generator().manual_seed(1)) * 2).bfloat16()
    for options in ({"top_k": 20}, {"top_k": 900}, {"top_k": 64, "top_p": 0.9}, {"top_p": 0.7}):
        rows = [SamplingRow(SamplingParams(**options), seed, 0) for seed in range(len(logits))]
        expected = [reference_draw(x.float().numpy(), row, uniform(row.seed, 0)) for x, row in zip(logits, rows, strict=True)]
        assert [row.token for row in sample(logits, rows)] == expected


def test_flat_rows_and_extreme_parameters() -> None:
    """All logits equal; a top_p that rounding can hardly reach; a temperature far below the least."""
    flat = torch.zeros(1, 2000)
    for options in ({"top_p": 1 - 1e-12}, {"top_p": 1e-9}, {"top_k": 10**9}, {"temperature": 1e-6}, {"min_p": 1.0}):
        rows = [SamplingRow(SamplingParams(**options), 3, position) for position in range(50)]
        tokens = {row.token for row in sample(flat.expand(50, -1), rows)}
        assert len(tokens) > 40 if options != {"top_p": 1e-9} else tokens == {0}
