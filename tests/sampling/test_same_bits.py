"""Same request, same bits: a row's answer alone is its answer in every batch, at every place, for every number of threads."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.request import SamplingParams
from quire.sampling import SampledRow, SamplingRow, sample, score
from quire.sampling.blocks import best, block_masses, largest, pad_to_blocks
from quire.sampling.filters import temper

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


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_each_operation_used_is_the_same_for_any_number_of_rows(vocabulary: int) -> None:
    """The premises of the two tests above, one by one, so that a new torch that breaks one is named at once."""

    def weights(x: Tensor) -> Tensor:
        return temper(x, x.amax(-1), torch.full((len(x),), 0.7))

    operations: dict[str, Callable[[Tensor], Tensor]] = {
        "log_softmax": lambda x: torch.log_softmax(x[:, :vocabulary], dim=-1),
        "exp": weights,
        "block_masses": lambda x: block_masses(weights(x)),
        "cumsum": lambda x: weights(x).double().cumsum(-1),
        "best": lambda x: best(x)[1],
        "largest": lambda x: largest(x, min(20, x.shape[1]))[1],
    }
    padded = pad_to_blocks(some_logits(17, vocabulary, seed=5))
    for name, operation in operations.items():
        torch.set_num_threads(1)
        expected = operation(padded)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for start, stop in [(0, 17), (0, 1), (8, 9), (16, 17), (3, 5), (1, 17)]:
                assert torch.equal(operation(padded[start:stop].clone()), expected[start:stop]), (name, threads, start, stop)


def test_cumulative_sums_of_a_prefix_are_a_prefix() -> None:
    """So the number of candidates that were looked at does not change the sums of those that count."""
    weights = torch.rand(3, 5000, generator=torch.Generator().manual_seed(0)).double()
    whole = weights.cumsum(-1)
    for length in (1, 2, 3, 17, 128, 4999):
        assert torch.equal(weights[:, :length].contiguous().cumsum(-1), whole[:, :length])


def test_half_precision_logits_mean_their_float32_values() -> None:
    rows = some_rows(20, 1000, seed=9)
    for dtype in (torch.bfloat16, torch.float16):
        logits = some_logits(20, 1000, seed=9).to(dtype)
        assert [bits(row) for row in sample(logits, rows)] == [bits(row) for row in sample(logits.float(), rows)]


def test_a_view_with_strides_means_its_values() -> None:
    rows, wide = some_rows(6, 500, seed=2), some_logits(12, 700, seed=2)
    for view in (wide[::2, 100:600], wide[:6, :500], wide.t().contiguous().t()[6:, 11:511]):
        assert [bits(row) for row in sample(view, rows)] == [bits(row) for row in sample(view.clone(), rows)]
