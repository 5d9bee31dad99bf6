"""The order of the steps: each case has another answer if two neighbours are swapped. And each step's own rule, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from quire import ops
from quire.request import SamplingParams
from quire.sampling import SamplingRow, bad_word_ids, sample, score, top_candidates


def every_logprob(logits: torch.Tensor) -> torch.Tensor:
    """Against float64: tests/ops/test_native_vocabulary.py."""
    return ops.log_softmax_at(logits, torch.arange(logits.shape[1]).expand(len(logits), -1))


def drawable(weights_or_logits: list[float], *, weights: bool = False, **options: Any) -> set[int]:
    """Every token that 400 draws show."""
    logits = torch.tensor(weights_or_logits).log() if weights else torch.tensor(weights_or_logits)
    context = {key: options.pop(key) for key in ("prompt_ids", "output_ids", "stop_ids", "bad_words") if key in options}
    rows = [SamplingRow(SamplingParams(**options), 5, position, **context) for position in range(400)]
    return {row.token for row in sample(logits.expand(400, -1), rows)}


def greedy(logits: list[float], **options: Any) -> int:
    context = {key: options.pop(key) for key in ("prompt_ids", "output_ids", "stop_ids", "bad_words") if key in options}
    params = SamplingParams(temperature=0.0, **options)
    return sample(torch.tensor([logits]), [SamplingRow(params, 0, len(context.get("output_ids", ())), **context)])[0].token


def test_raw_logprobs_come_before_everything() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    params = SamplingParams(temperature=0.0, logprobs=2, logit_bias={3: 50.0}, allowed_token_ids=[1, 3], repetition_penalty=2.0)
    row = sample(logits, [SamplingRow(params, 0, 0, prompt_ids=[0, 3])])[0]
    raw = every_logprob(logits)[0].tolist()
    assert (row.token, row.logprob, row.rank) == (3, raw[3], 4)
    assert row.top == ((0, raw[0]), (1, raw[1]))


def test_masks_come_before_the_bias() -> None:
    assert greedy([0.0, 5.0, 1.0], allowed_token_ids=[0, 2], logit_bias={1: 100.0}) == 2
    assert greedy([0.0, 5.0, 1.0], bad_words=((1,),), logit_bias={1: 100.0}) == 2
    assert greedy([0.0, 5.0, 1.0], min_tokens=1, stop_ids=frozenset({1}), logit_bias={1: 100.0}) == 2


def test_bias_comes_before_the_repetition_penalty() -> None:
    # (-1 + 4) / 2 = 1.5 loses to 1.75; swapped, -1 * 2 + 4 = 2 would win.
    assert greedy([-1.0, 1.75], logit_bias={0: 4.0}, repetition_penalty=2.0, prompt_ids=[0]) == 1


def test_repetition_comes_before_frequency_and_presence() -> None:
    # 2 / 2 - 1 = 0 loses to 0.25; swapped, (2 - 1) / 2 = 0.5 would win.
    for penalty in ("frequency_penalty", "presence_penalty"):
        assert greedy([2.0, 0.25], repetition_penalty=2.0, output_ids=[0], **{penalty: 1.0}) == 1


def test_penalties_come_before_temperature() -> None:
    # (1 - 1) / 2 = 0 / 2, equally likely; swapped, 1 / 2 - 1 = -0.5 would fall below min_p.
    assert drawable([0.0, 1.0], temperature=2.0, frequency_penalty=1.0, output_ids=[1], min_p=0.9) == {0, 1}


def test_temperature_comes_before_min_p() -> None:
    # exp(-1 / 2) = 0.61 stays; swapped, exp(-1) = 0.37 would go.
    assert drawable([0.0, -1.0], temperature=2.0, min_p=0.5) == {0, 1}


def test_temperature_comes_before_top_p() -> None:
    # 0.5, 0.5 * e^-2, ... at temperature 0.5 the first has 0.98; swapped, 0.88 would need the second.
    assert drawable([0.0, -2.0], temperature=0.5, top_p=0.9) == {0}


def test_min_p_comes_before_top_p() -> None:
    # After min_p the first of two has 4/7 = 0.571; swapped, its 0.4 would need the second.
    assert drawable([0.4, 0.3, 0.1, 0.1, 0.1], weights=True, min_p=0.5, top_p=0.57) == {0}


def test_top_k_comes_before_top_p() -> None:
    assert drawable([0.4, 0.3, 0.1, 0.1, 0.1], weights=True, top_k=2, top_p=0.57) == {0}
    assert drawable([0.4, 0.3, 0.1, 0.1, 0.1], weights=True, top_p=0.57) == {0, 1}


def test_min_p_and_top_k_keep_the_same_in_either_order() -> None:
    """Both keep a prefix of the most likely tokens, so no test can tell them apart; the shorter prefix wins."""
    assert drawable([0.4, 0.3, 0.1, 0.1, 0.1], weights=True, min_p=0.2, top_k=3) == {0, 1, 2}
    assert drawable([0.4, 0.3, 0.1, 0.1, 0.1], weights=True, min_p=0.5, top_k=3) == {0, 1}


def test_greedy_ignores_the_filters_and_takes_the_lowest_id_of_equals() -> None:
    for width in (4, 127, 128, 129, 1000):
        logits = [0.0] * width
        logits[1] = logits[-1] = logits[width // 2] = 3.0
        assert greedy(logits, top_p=0.01, top_k=3, min_p=1.0) == 1
        assert drawable(logits, top_k=1) == {1}
        assert drawable(logits, top_k=2) == {1, width // 2}


def test_top_p_keeps_the_token_that_reaches_it_and_at_least_one() -> None:
    quarters = [0.25, 0.25, 0.25, 0.25]
    assert drawable(quarters, weights=True, top_p=0.5) == {0, 1}
    assert drawable(quarters, weights=True, top_p=0.51) == {0, 1, 2}
    assert drawable(quarters, weights=True, top_p=0.001) == {0}


def test_least_temperature() -> None:
    """0 < temperature < 0.01 is raised to 0.01, as in vLLM: tokens 0.01 apart are still e : 1."""
    rows = [SamplingRow(SamplingParams(temperature=1e-5), 1, position) for position in range(4000)]
    first = sum(row.token == 0 for row in sample(torch.tensor([0.01, 0.0]).expand(4000, -1), rows)) / 4000
    assert abs(first - math.e / (1 + math.e)) < 0.03


def test_penalties_look_where_they_should() -> None:
    """Repetition over prompt and output; frequency counts the output; presence does not count; none looks elsewhere."""
    assert greedy([1.0, 0.9], repetition_penalty=1.5, prompt_ids=[0]) == 1
    assert greedy([1.0, 0.9], repetition_penalty=1.5, output_ids=[0]) == 1
    assert greedy([-0.9, -1.0], repetition_penalty=1.5, prompt_ids=[0, 0, 0]) == 1
    assert greedy([1.0, 0.9], frequency_penalty=2.0, presence_penalty=2.0, prompt_ids=[0]) == 0
    assert greedy([1.0, 0.9], frequency_penalty=0.2, output_ids=[0]) == 1
    assert greedy([1.0, 0.9, 0.85], frequency_penalty=0.04, output_ids=[0, 0, 0, 1, 1, 1]) == 0
    assert greedy([1.0, 0.9, 0.85], frequency_penalty=0.04, output_ids=[0, 0, 0, 0, 1, 2]) == 1
    assert greedy([1.0, 0.5], presence_penalty=0.4, output_ids=[0] * 100) == 0
    assert greedy([1.0, 0.5], presence_penalty=0.6, output_ids=[0] * 100) == 1


def test_bad_words_block_only_the_last_token_after_the_others() -> None:
    logits = [0.0, 1.0, 3.0, 2.0]
    assert greedy(logits, bad_words=((1, 2),), output_ids=[0, 1]) == 3
    assert greedy(logits, bad_words=((1, 2),), output_ids=[1, 0]) == 2
    assert greedy(logits, bad_words=((1, 2),), prompt_ids=[1]) == 2
    assert greedy(logits, bad_words=((2,), (0, 3)), output_ids=[0]) == 1
    assert greedy(logits, bad_words=((0, 1, 1, 2),), output_ids=[1]) == 2
    assert greedy(logits, bad_words=((),)) == 2


def test_bad_words_are_spelled_with_and_without_a_space() -> None:
    class Letters:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            assert add_special_tokens is False
            return [ord(letter) for letter in text]

    assert bad_word_ids(Letters(), ["ab", " ab", "c"]) == ((97, 98), (32, 97, 98), (99,), (32, 99))


def test_min_tokens_mask_stops_only_until_then() -> None:
    stops = frozenset({1, 2})
    assert greedy([0.0, 2.0, 1.0], min_tokens=2, stop_ids=stops, output_ids=[0]) == 0
    for bias in (None, {0: -1.0}):
        assert greedy([0.0, 2.0, 1.0], min_tokens=1, stop_ids=stops, output_ids=[0], logit_bias=bias) == 1


def test_grammar_mask_and_allowed_ids_both_hold() -> None:
    allowed = torch.tensor([True, True, False, True])
    params = SamplingParams(temperature=0.0, allowed_token_ids=[0, 1, 2])
    assert sample(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), [SamplingRow(params, 0, 0, allowed=allowed)])[0].token == 1


def test_ids_outside_the_vocabulary_touch_nobody() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    options = {"logit_bias": {3: 9.0, -1: 9.0}, "allowed_token_ids": [2, 5], "min_tokens": 5, "frequency_penalty": 2.0}
    wild = SamplingRow(
        SamplingParams(temperature=0.0, repetition_penalty=2.0, **options),
        0,
        0,
        prompt_ids=[3, 99, -2],
        output_ids=[4, -1],
        stop_ids=frozenset({3, -1}),
        bad_words=((4,), (-1,)),
    )
    tame = SamplingRow(SamplingParams(temperature=0.0), 0, 0)
    for rows in ([wild, tame], [tame, wild]):
        assert [row.token for row in sample(logits, rows)] == [2, 2]


def test_nothing_left_to_draw_is_corrupted() -> None:
    for options in ({"temperature": 0.0}, {"temperature": 1.0}, {"top_p": 0.5}):
        params = SamplingParams(allowed_token_ids=[1], logprobs=1, **options)
        assert sample(torch.zeros(1, 4), [SamplingRow(params, 0, 0, bad_words=((1,),))])[0].corrupted
        params = SamplingParams(allowed_token_ids=[7], **options)
        assert sample(torch.zeros(1, 4), [SamplingRow(params, 0, 0)])[0].corrupted


@pytest.mark.parametrize("count", [0, 1, 3, -1])
def test_score_gives_raw_logprobs_of_given_tokens(count: int) -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    targets = [0, 299, 17, 17, 128]
    raw = every_logprob(logits)
    for x, lp, target, row in zip(logits, raw, targets, score(logits, targets, count), strict=True):
        order = x.sort(descending=True, stable=True).indices.tolist()
        assert (row.token, row.logprob, row.rank) == (target, lp[target].item(), order.index(target) + 1)
        assert row.top == tuple((token, lp[token].item()) for token in order[: 300 if count == -1 else count])


def test_ranks_and_alternatives_agree_among_equals() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0, 1.0]]).expand(6, -1)
    rows = score(logits, list(range(6)), 6)
    assert [token for token, _ in rows[0].top] == [1, 2, 4, 0, 5, 3]
    assert [row.rank for row in rows] == [4, 1, 2, 6, 3, 5]


def test_top_candidates() -> None:
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    logits[1, 7] = math.nan
    for temperature in (0.0, 1.0, 0.5):
        found = top_candidates(logits, 4, temperature)
        raw = every_logprob(logits / (temperature or 1.0))
        for row in (0, 2):
            best = raw[row].topk(4)
            assert found[row] == tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        assert found[1] == ()


def test_logprobs_are_not_computed_unasked() -> None:
    row = sample(torch.randn(1, 10), [SamplingRow(SamplingParams(), 0, 0)])[0]
    assert (row.logprob, row.rank, row.top) == (0.0, 0, ())


def test_logits_are_left_as_they_are() -> None:
    logits = torch.randn(4, 300)
    before = logits.clone()
    params = SamplingParams(repetition_penalty=1.3, logit_bias={1: 4.0}, min_p=0.1, top_p=0.9, logprobs=2)
    sample(logits, [SamplingRow(params, 0, 0, prompt_ids=[1, 2])] * 4)
    score(logits, [0] * 4, 2)
    top_candidates(logits, 2, 0.7)
    assert torch.equal(logits, before)


def test_no_rows() -> None:
    assert sample(torch.empty(0, 10), []) == []
    assert score(torch.empty(0, 10), [], 1) == []
