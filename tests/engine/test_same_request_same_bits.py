"""The second promise: tokens and log-probabilities do not depend on what else is in the batch, on chunking, on prefix-cache
hits, on preemption, on streaming or on drafts."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from quire import LLM, SamplingParams
from quire.request import CompletionOutput, EngineRequest, RequestOutput, RequestOutputKind

REQUESTS = 200
ABORTED = 25
DRAFTS = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3}


def draw_requests(rng: random.Random) -> list[tuple[list[int], SamplingParams]]:
    """Mixed lengths, seeds, n, penalties, filters, log-probabilities and stops; half the prompts share a prefix, and a third of
    the texts have so few words that drafts often come true."""
    prefixes = [[rng.randrange(2, 320) for _ in range(length)] for length in (16, 33, 64, 90)]
    drawn = []
    for number in range(REQUESTS):
        tail = [rng.randrange(2, 320) for _ in range(rng.randint(1, 40))]
        prompt = (rng.choice(prefixes) if rng.random() < 0.5 else []) + tail
        greedy = rng.random() < 0.2
        params = SamplingParams(
            n=1 if greedy else rng.choice([1, 1, 1, 2, 3]),
            temperature=0.0 if greedy else rng.choice([0.5, 0.8, 1.0, 1.5]),
            top_p=rng.choice([1.0, 0.9, 0.5]),
            top_k=rng.choice([0, 0, 5, 50]),
            min_p=rng.choice([0.0, 0.05]),
            repetition_penalty=rng.choice([1.0, 1.1, 1.3]),
            presence_penalty=rng.choice([0.0, 0.5]),
            frequency_penalty=rng.choice([0.0, -0.5]),
            seed=number * 7919,
            max_tokens=rng.randint(5, 40),
            min_tokens=rng.choice([0, 0, 1, 5]),
            logprobs=rng.choice([None, 0, 1, 5]),
            prompt_logprobs=rng.choice([None] * 9 + [2]),
            stop_token_ids=[rng.randrange(2, 320)] if rng.random() < 0.3 else None,
            stop=["th"] if rng.random() < 0.1 else None,
            logit_bias={rng.randrange(2, 320): 5.0} if rng.random() < 0.1 else None,
            allowed_token_ids=[1, *rng.sample(range(2, 320), rng.choice([1, 2, 4]))] if rng.random() < 0.35 else None,
            bad_words=["the"] if rng.random() < 0.1 else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        drawn.append((prompt, params))
    return drawn


def facts(sample: CompletionOutput) -> tuple:
    return (sample.token_ids, sample.logprobs, sample.cumulative_logprob, sample.text, sample.finish_reason, sample.stop_reason)


def accept(llm: LLM, number: int, prompt: list[int], params: SamplingParams) -> EngineRequest:
    return llm._intake.accept(prompt, params, f"r{number}", arrival_time=time.monotonic())


def run_crowd(llm: LLM, requests: list, rng: random.Random) -> tuple[dict[str, RequestOutput], set[str]]:
    """Requests arrive while others run; some are aborted at a random moment. Returns the outputs and who was aborted."""
    engine, outputs = llm._engine, {}
    arriving: Iterator = iter(enumerate(requests))
    doomed = {f"r{number}" for number in rng.sample(range(len(requests)), ABORTED)}
    aborted: set[str] = set()
    more = True
    while more or engine.has_work():
        for _ in range(rng.choice([0, 1, 2, 8])):
            entry = next(arriving, None)
            more = entry is not None
            if not more:
                break
            number, (prompt, params) = entry
            engine.add(accept(llm, number, prompt, params))
        for request_id in sorted(doomed - aborted):
            if rng.random() < 0.05 and engine.scheduler.sequences_of(request_id):
                outputs[request_id] = engine.abort(request_id)
                aborted.add(request_id)
        for output in engine.step():
            outputs[output.request_id] = output
        engine.scheduler.pool.check()
    return outputs, aborted


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def alone(request: pytest.FixtureRequest, tiny_llama: Path) -> tuple[str, list, list[RequestOutput]]:
    """(dtype, the requests, the output of each when it has the engine for itself)."""
    requests = draw_requests(random.Random(1))
    solo = LLM(str(tiny_llama), dtype=request.param, max_model_len=192, enable_prefix_caching=False)
    return request.param, requests, [solo.generate([prompt], params, use_tqdm=False)[0] for prompt, params in requests]


@pytest.mark.parametrize("drafts", [None, DRAFTS], ids=["one by one", "with drafts"])
def test_two_hundred_requests_in_a_crowd_equal_their_solo_runs(
    tiny_llama: Path, alone: tuple[str, list, list[RequestOutput]], drafts: dict[str, object] | None
) -> None:
    dtype, requests, expectations = alone
    crowd = LLM(
        str(tiny_llama),
        dtype=dtype,
        max_model_len=192,
        max_num_batched_tokens=64,
        max_num_seqs=24,
        num_gpu_blocks_override=40,
        speculative_config=drafts,
    )
    outputs, aborted = run_crowd(crowd, requests, random.Random(2))

    counters, pool = crowd._engine.scheduler.counters, crowd._engine.scheduler.pool
    speculated = crowd._engine.scheduler.speculated
    assert drafts is None or min(speculated.accepted, speculated.draft_tokens - speculated.accepted) > 20
    assert counters.preemptions > 20
    assert counters.prefix_hits > 500
    assert len(aborted) > 5
    assert pool.num_held == 0
    for number, expected in enumerate(expectations):
        got = outputs[f"r{number}"]
        if f"r{number}" in aborted:
            for ours, whole in zip(got.outputs, expected.outputs, strict=True):
                count = len(ours.token_ids)
                assert ours.token_ids == whole.token_ids[:count]
                assert whole.logprobs is None or ours.logprobs == whole.logprobs[:count]
            continue
        assert [facts(sample) for sample in got.outputs] == [facts(sample) for sample in expected.outputs], number
        assert got.prompt_logprobs == expected.prompt_logprobs, number


def test_threads_do_not_change_bits(tiny_llama: Path) -> None:
    prompts = [[5, 9, 200, 31] * 20, [7, 7, 7], list(range(2, 120))]
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=30, logprobs=3)
    results = []
    for threads in (1, 2):
        llm = LLM(str(tiny_llama), threads=threads)
        results.append([facts(output.outputs[0]) for output in llm.generate(prompts, params, use_tqdm=False)])
    assert results[0] == results[1]


def test_streamed_pieces_add_up_to_the_whole(tiny_llama: Path) -> None:
    llm = LLM(str(tiny_llama))
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=60, logprobs=1, n=2)
    (whole,) = llm.generate([[9, 8, 7]], params, use_tqdm=False)
    llm._engine.add(accept(llm, 0, [9, 8, 7], params.clone(output_kind=RequestOutputKind.DELTA)))
    pieces: dict[int, list[CompletionOutput]] = {0: [], 1: []}
    while llm._engine.has_work():
        for output in llm._engine.step():
            for sample in output.outputs:
                pieces[sample.index].append(sample)
    for sample in whole.outputs:
        assert [token for piece in pieces[sample.index] for token in piece.token_ids] == sample.token_ids
        assert [entry for piece in pieces[sample.index] for entry in piece.logprobs] == sample.logprobs
        assert "".join(piece.text for piece in pieces[sample.index]) == sample.text
