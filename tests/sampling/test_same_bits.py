"""Same request, same bits: a row's answer alone is its answer in every batch, at every place, for every number of threads."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.request import SamplingParams
from quire.sampling import SampledRow, SamplingRow, sample, score

VOCABULARIES = [7, 128, 257, 4096, 50257, 151936, 151937]


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def some_params(source: random.Random, vocabulary: int) -> SamplingParams:
    def sometimes(value: Any, otherwise: Any) -> Any:
        return value if source.random() < 0.4 else otherwise

    return SamplingParams(
        temperature=source.choice([0.0, 0.3, 1.0, 1.0, 2.0]),
        top_k=sometimes(source.choice([1, 5, 50, 400, 3000]), 0),
        top_p=sometimes(source.choice([0.5, 0.9, 0.999]), 1.0),
        min_p=sometimes(0.01, 0.0),
        repetition_penalty=sometimes(1.3, 1.0),
        frequency_penalty=sometimes(0.4, 0.0),
        presence_penalty=sometimes(-0.4, 0.0),
        logprobs=sometimes(source.choice([0, 1, 5, 20]), None),
        logit_bias=sometimes({source.randrange(vocabulary): 2.5}, None),
        allowed_token_ids=source.sample(range(vocabulary), 5) if source.random() < 0.1 else None,
        min_tokens=sometimes(10, 0),
        max_tokens=100,
    )


def some_rows(count: int, vocabulary: int, seed: int) -> list[SamplingRow]:
    source = random.Random(seed)
    return [
        SamplingRow(
            some_params(source, vocabulary),
            seed=source.randrange(2**63),
            position=source.randrange(20),
            prompt_ids=[source.randrange(vocabulary) for _ in range(source.randrange(30))],
            output_ids=[source.randrange(vocabulary) for _ in range(source.randrange(30))],
            stop_ids=frozenset({source.randrange(vocabulary)}),
            bad_words=((source.randrange(vocabulary),),),
        )
        for _ in range(count)
    ]


def some_logits(count: int, vocabulary: int, seed: int) -> Tensor:
    """Peaked, flat and tied rows."""
    logits = torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(seed))
    logits *= torch.tensor([0.3, 2.0, 6.0]).repeat(count)[:count].unsqueeze(1)
    logits[::4] = logits[::4].bfloat16().float()
    return logits


def bits(row: SampledRow) -> str:
    return repr((row, row.logprob.hex(), [value.hex() for _, value in row.top]))


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_row_is_the_same_in_every_batch(vocabulary: int) -> None:
    count = 30 if vocabulary < 10_000 else 9
    rows, logits = some_rows(count, vocabulary, seed=vocabulary), some_logits(count, vocabulary, seed=3)
    torch.set_num_threads(1)
    alone = [bits(sample(logits[index : index + 1].clone(), [row])[0]) for index, row in enumerate(rows)]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert [bits(row) for row in sample(logits, rows)] == alone
        order = random.Random(threads).sample(range(count), count)
        for size in (1, 2, 5, count):
            for start in range(0, count, size):
                part = order[start : start + size]
                assert [bits(row) for row in sample(logits[part], [rows[at] for at in part])] == [alone[at] for at in part]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_prompt_logprobs_are_the_same_in_every_batch(vocabulary: int) -> None:
    count = 9
    logits = some_logits(count, vocabulary, seed=4)
    targets = [(97 * index) % vocabulary for index in range(count)]
    torch.set_num_threads(1)
    alone = [bits(score(logits[at : at + 1].clone(), [targets[at]], 5)[0]) for at in range(count)]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert [bits(row) for row in score(logits, targets, 5)] == alone
        assert [bits(score(logits[at : at + 1].clone(), [targets[at]], 5)[0]) for at in range(count)] == alone


def test_half_precision_logits_mean_their_float32_values() -> None:
    rows = some_rows(20, 1000, seed=9)
    for dtype in (torch.bfloat16, torch.float16):
        logits = some_logits(20, 1000, seed=9).to(dtype)
        assert [bits(row) for row in sample(logits, rows)] == [bits(row) for row in sample(logits.float(), rows)]


def test_a_view_with_strides_means_its_values() -> None:
    rows, wide = some_rows(6, 500, seed=2), some_logits(12, 700, seed=2)
    for view in (wide[::2, 100:600], wide[:6, :500], wide.t().contiguous().t()[6:, 11:511]):
        assert [bits(row) for row in sample(view, rows)] == [bits(row) for row in sample(view.clone(), rows)]
