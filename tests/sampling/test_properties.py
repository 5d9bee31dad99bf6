"""What must hold for any logits and any parameters (hypothesis)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.request import SamplingParams
from quire.sampling import SampledRow, SamplingRow, sample
from tests.sampling.sampling_reference import reference_logits, reference_logprobs, reference_probabilities

V = 150
token_ids = st.integers(0, V - 1)
texts = st.lists(token_ids, max_size=12)
# Eighths between -8 and 8: many ties, and exact in every precision that the two implementations use.
logit_rows = st.lists(st.integers(-64, 64), min_size=V, max_size=V).map(lambda row: torch.tensor(row) / 8)
parameters = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.001, 0.5, 1.0, 2.0])},
    optional={
        "top_k": st.integers(0, V + 10),
        "top_p": st.floats(0.01, 1.0),
        "min_p": st.floats(0.0, 1.0),
        "repetition_penalty": st.floats(0.5, 2.0),
        "frequency_penalty": st.floats(-2.0, 2.0),
        "presence_penalty": st.floats(-2.0, 2.0),
        "logit_bias": st.dictionaries(token_ids, st.integers(-100, 100).map(float), max_size=5),
        "allowed_token_ids": st.lists(token_ids, min_size=1, max_size=10),
        "min_tokens": st.integers(0, 16),
        "logprobs": st.sampled_from([0, 1, 5, -1]),
    },
)


@st.composite
def sampling_rows(draw: st.DrawFn, **fixed: Any) -> SamplingRow:
    return SamplingRow(
        SamplingParams(**{**draw(parameters), **fixed}),
        seed=draw(st.integers(0, 2**63 - 1)),
        position=draw(st.integers(0, 40)),
        prompt_ids=draw(texts),
        output_ids=draw(texts),
        stop_ids=frozenset(draw(st.lists(token_ids, max_size=3))),
        bad_words=tuple(map(tuple, draw(st.lists(st.lists(token_ids, min_size=1, max_size=3), max_size=4)))),
        allowed=draw(st.none() | st.lists(st.booleans(), min_size=V, max_size=V).map(torch.tensor)),
    )


def one(logits: torch.Tensor, row: SamplingRow) -> SampledRow:
    return sample(logits.unsqueeze(0), [row])[0]


@given(logit_rows, sampling_rows())
@settings(max_examples=150, deadline=None)
def test_a_drawn_token_is_never_masked_and_never_filtered(logits: torch.Tensor, row: SamplingRow) -> None:
    drawn = one(logits, row)
    shaped = reference_logits(logits.numpy(), row)
    assert drawn.corrupted == (not np.isfinite(shaped).any())
    if drawn.corrupted:
        return
    params = row.params
    assert np.isfinite(shaped[drawn.token])
    assert params.allowed_token_ids is None or drawn.token in params.allowed_token_ids
    assert row.allowed is None or row.allowed[drawn.token]
    assert row.position >= params.min_tokens or drawn.token not in row.stop_ids
    for word in row.bad_words:
        assert [*row.output_ids, drawn.token][-len(word) :] != list(word)
    # The reference's filters, a hair wider: penalties round differently in float32 and float64.
    wider = {"top_p": min(1.0, params.top_p + 1e-5), "min_p": max(0.0, params.min_p - 1e-5)}
    if params.temperature and params.top_k == 0:
        relaxed = SamplingRow(params.clone(**wider), *[getattr(row, name) for name in list(row.__dataclass_fields__)[1:]])
        assert reference_probabilities(logits.numpy(), relaxed)[0][drawn.token] > 0


@given(logit_rows, sampling_rows(top_k=1))
@settings(max_examples=60, deadline=None)
def test_top_k_of_one_is_greedy(logits: torch.Tensor, row: SamplingRow) -> None:
    fields = {name: getattr(row, name) for name in row.__dataclass_fields__}
    greedy = SamplingRow(**{**fields, "params": row.params.clone(temperature=0.0)})
    assert one(logits, row) == one(logits, greedy)


@given(logit_rows, sampling_rows())
@settings(max_examples=60, deadline=None)
def test_logprob_rank_and_alternatives_are_raw(logits: torch.Tensor, row: SamplingRow) -> None:
    drawn, asked = one(logits, row), row.params.logprobs
    if drawn.corrupted or asked is None:
        assert (drawn.logprob, drawn.rank, drawn.top) == (0.0, 0, ())
        return
    raw = reference_logprobs(logits.numpy())
    order = np.lexsort((np.arange(V), -logits.numpy()))
    assert math.isclose(drawn.logprob, raw[drawn.token], abs_tol=1e-5)
    assert order[drawn.rank - 1] == drawn.token
    assert [token for token, _ in drawn.top] == order[: V if asked == -1 else asked].tolist()
    assert np.allclose([value for _, value in drawn.top], raw[[token for token, _ in drawn.top]], atol=1e-5)


@given(
    st.lists(st.tuples(logit_rows, sampling_rows()), min_size=2, max_size=6),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.data(),
)
@settings(max_examples=30, deadline=None)
def test_a_poisoned_row_hurts_only_itself(
    pairs: list[tuple[torch.Tensor, SamplingRow]], poison: float, data: st.DataObject
) -> None:
    logits, rows = torch.stack([x for x, _ in pairs]), [row for _, row in pairs]
    alone = [one(x, row) for x, row in pairs]
    victim = data.draw(st.integers(0, len(rows) - 1))
    if poison == -math.inf:
        logits[victim] = poison
    else:
        logits[victim, data.draw(token_ids)] = poison
    drawn = sample(logits, rows)
    assert drawn[victim].corrupted
    assert drawn[:victim] + drawn[victim + 1 :] == alone[:victim] + alone[victim + 1 :]


@given(logit_rows, st.lists(token_ids, min_size=1, max_size=6, unique=True))
@settings(max_examples=20, deadline=None)
def test_allowed_ids_are_exact(logits: torch.Tensor, allowed: list[int]) -> None:
    """Each of them can be drawn, and nothing else, when they are equally likely."""
    logits[allowed] = 0.0
    rows = [SamplingRow(SamplingParams(allowed_token_ids=allowed), 1, position) for position in range(200)]
    assert {row.token for row in sample(logits.expand(200, -1), rows)} == set(allowed)
