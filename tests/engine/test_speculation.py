"""Drafts change how many steps a text takes and nothing else: tokens, log-probabilities, ends and pieces are as without."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, BeamSearchParams, EngineConfig, SamplingParams
from quire.cli.flags import build, options_of
from quire.engine.drawing import good
from quire.errors import ConfigError
from quire.request import CompletionOutput, RequestOutputKind
from quire.sampling.rows import SampledRow
from quire.speculation import Speculation

DRAFTS = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
FEW = [5, 9, 200]  # a text of few words repeats itself, whatever the weights are


@pytest.fixture(scope="module")
def plain(tiny_llama: Path) -> LLM:
    return LLM(str(tiny_llama), max_model_len=256)


@pytest.fixture(scope="module")
def drafting(tiny_llama: Path) -> LLM:
    return LLM(str(tiny_llama), max_model_len=256, speculative_config=DRAFTS)


def run(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> tuple[list[list[tuple]], int]:
    """(everything that is told of each sample, steps that it took)."""
    before = llm._engine.steps
    outputs = llm.generate(prompts, params, use_tqdm=False)
    llm._engine.scheduler.pool.check()
    assert llm._engine.scheduler.pool.num_held == 0
    return [[facts(sample) for sample in output.outputs] for output in outputs], llm._engine.steps - before


def facts(sample: CompletionOutput) -> tuple:
    return (sample.token_ids, sample.logprobs, sample.cumulative_logprob, sample.text, sample.finish_reason, sample.stop_reason)


def test_a_text_that_repeats_itself_takes_fewer_steps_than_tokens(plain: LLM, drafting: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logprobs=2, allowed_token_ids=FEW)
    expected, steps = run(plain, [FEW * 6], params)
    got, fewer = run(drafting, [FEW * 6], params)
    assert got == expected
    assert (steps, len(got[0][0][0])) == (60, 60)
    assert fewer < 40


def test_metrics_have_vllms_names_and_add_up(drafting: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, allowed_token_ids=[7])
    metrics = drafting._engine._stats.metrics

    def total(name: str, **labels: str) -> float:
        return metrics.value(f"vllm:{name}_total", **labels)

    names = ("spec_decode_num_drafts", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens", "generation_tokens")
    before = [total(name) for name in names]
    _, steps = run(drafting, [[7, 7, 7]], params)
    drafts, tokens, accepted, generated = (total(name) - old for name, old in zip(names, before, strict=True))
    assert generated == 30
    # With one word to choose from every draft comes true: nothing is drafted in vain, not even beyond max_tokens.
    assert steps + accepted == 30
    assert accepted == tokens > 15
    assert 0 < drafts <= steps < 12
    places = [total("spec_decode_num_accepted_tokens_per_pos", position=str(place)) for place in range(4)]
    assert sum(places) == total("spec_decode_num_accepted_tokens")
    assert places == sorted(places, reverse=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 1.0, "seed": 4, "n": 3},
        {"temperature": 0.7, "seed": 5, "top_p": 0.8, "top_k": 2, "min_p": 0.05},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 0.8, "seed": 6, "frequency_penalty": 0.3, "presence_penalty": -0.2},
        {"temperature": 0.0, "frequency_penalty": 2.0},
        {"temperature": 1.0, "seed": 7, "min_tokens": 30, "stop_token_ids": [200]},
        {"temperature": 0.5, "seed": 8, "logit_bias": {9: 1.5}, "prompt_logprobs": 1},
        {"temperature": 1.0, "seed": 9, "allowed_token_ids": [104, 101, 32], "bad_words": ["he"]},
    ],
    ids=str,
)
def test_every_parameter_sees_the_history_that_it_would_have_seen(
    plain: LLM, drafting: LLM, changes: dict[str, Any]
) -> None:
    params = SamplingParams(**{"max_tokens": 50, "logprobs": 1, "allowed_token_ids": FEW, **changes})
    prompts = [FEW * 4, [9, 200] * 7]
    before = drafting._engine.scheduler.speculated.draft_tokens
    assert run(drafting, prompts, params)[0] == run(plain, prompts, params)[0]
    assert drafting._engine.scheduler.speculated.draft_tokens > before


@pytest.mark.parametrize("length", range(5, 12))
def test_a_stop_string_is_found_inside_an_accepted_run(plain: LLM, drafting: LLM, length: int) -> None:
    token = plain.get_tokenizer().encode("q")[0]
    params = SamplingParams(temperature=0, max_tokens=40, logprobs=0, allowed_token_ids=[token], stop=["q" * length])
    (((tokens, *_, text, reason, stop),),), steps = run(drafting, [[token] * 4], params)
    assert (len(tokens), text, reason, stop) == (length, "", "stop", "q" * length)
    assert steps < length
    kept = params.clone(include_stop_str_in_output=True, min_tokens=3)
    assert run(drafting, [[token] * 4], kept)[0] == run(plain, [[token] * 4], kept)[0]


@pytest.mark.parametrize("most", range(1, 9))
def test_max_tokens_is_reached_exactly(drafting: LLM, most: int) -> None:
    (((tokens, *_, reason, _),),), _ = run(
        drafting, [[7] * 8], SamplingParams(temperature=0, max_tokens=most, ignore_eos=True, allowed_token_ids=[7])
    )
    assert (tokens, reason) == ([7] * most, "length")


def test_the_longest_text_ends_at_max_model_len(plain: LLM, drafting: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True, allowed_token_ids=[7, 8])
    assert run(drafting, [[7, 8] * 120], params)[0] == run(plain, [[7, 8] * 120], params)[0]


def test_streamed_pieces_of_several_tokens_add_up_to_the_whole(plain: LLM, drafting: LLM) -> None:
    params = SamplingParams(temperature=0.6, seed=5, max_tokens=60, logprobs=1, n=2, allowed_token_ids=FEW, ignore_eos=True)
    (whole,) = plain.generate([FEW * 5], params, use_tqdm=False)
    delta = params.clone(output_kind=RequestOutputKind.DELTA)
    drafting._engine.add(drafting._intake.accept(FEW * 5, delta, "streamed", arrival_time=time.monotonic()))
    pieces: dict[int, list[CompletionOutput]] = {0: [], 1: []}
    while drafting._engine.has_work():
        for output in drafting._engine.step():
            for sample in output.outputs:
                pieces[sample.index].append(sample)
    for sample in whole.outputs:
        mine = pieces[sample.index]
        assert max(len(piece.token_ids) for piece in mine) > 1
        assert [token for piece in mine for token in piece.token_ids] == sample.token_ids
        assert [entry for piece in mine for entry in piece.logprobs] == sample.logprobs
        assert "".join(piece.text for piece in mine) == sample.text


def test_what_drafts_left_in_the_cache_is_what_is_computed_without(plain: LLM, drafting: LLM) -> None:
    """A text is continued from blocks that were filled by drafts, right and wrong ones, and rolled back."""
    params = SamplingParams(temperature=0.9, seed=12, max_tokens=80, logprobs=1, allowed_token_ids=FEW, ignore_eos=True)
    before = drafting._engine.scheduler.speculated.copy()
    (first,) = drafting.generate([FEW * 3], params, use_tqdm=False)
    drafted = drafting._engine.scheduler.speculated.since(before)
    assert 0 < drafted.accepted < drafted.draft_tokens
    longer = FEW * 3 + first.outputs[0].token_ids
    (again,) = drafting.generate([longer], params, use_tqdm=False)
    assert again.num_cached_tokens >= 80
    plain.reset_prefix_cache()
    (expected,) = plain.generate([longer], params, use_tqdm=False)
    assert expected.num_cached_tokens == 0
    assert facts(again.outputs[0]) == facts(expected.outputs[0])


def test_beams_have_no_drafts(plain: LLM, drafting: LLM) -> None:
    before = drafting._engine.scheduler.speculated.drafts
    params = BeamSearchParams(beam_width=2, max_tokens=12, ignore_eos=True)
    found, expected = (llm.beam_search([FEW * 5], params)[0].sequences for llm in (drafting, plain))
    assert [beam.tokens for beam in found] == [beam.tokens for beam in expected]
    assert drafting._engine.scheduler.speculated.drafts == before


def test_rows_after_the_first_surprise_do_not_count() -> None:
    a, b, c, broken = SampledRow(1), SampledRow(2), SampledRow(3), SampledRow(0, corrupted=True)
    assert good([a], ()) == [a]
    assert good([a, b, c], (1, 2)) == [a, b, c]
    assert good([a, b, c], (1, 9)) == [a, b]
    assert good([a, b, c], (9, 2)) == [a]
    assert good([a, broken, c], (1, 0)) == [a, broken]
    assert good([a, broken, c], (9, 0)) == [a]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("ngram", "speculative_config must be a mapping"),
        ({"num_speculative_tokens": 4}, "method must be ngram .* got None"),
        ({"method": "eagle", "num_speculative_tokens": 4}, "method must be ngram .* got 'eagle'"),
        ({"method": "ngram"}, r"needs num_speculative_tokens, a whole number in \[1, 16\]"),
        ({"method": "ngram", "num_speculative_tokens": 0}, r"tokens must be a whole number in \[1, 16\], got 0"),
        ({"method": "ngram", "num_speculative_tokens": True}, "got True"),
        ({"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 2.5}, r"lookup_max .* \[1, 32\], got 2.5"),
        ({**DRAFTS, "prompt_lookup_min": 5}, "prompt_lookup_min must be at most prompt_lookup_max=3, got 5"),
        ({**DRAFTS, "prompt_look_min": 5}, "unknown key 'prompt_look_min'.* Did you mean \"prompt_lookup_min\""),
        ({**DRAFTS, "model": "small"}, "unknown key 'model'"),
    ],
)
def test_a_wrong_configuration_is_refused_with_its_key(tiny_llama: Path, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(str(tiny_llama), speculative_config=options)


def test_the_command_line_names_its_flag() -> None:
    (option,) = (option for option in options_of(EngineConfig, "Engine") if option.name == "speculative_config")
    read = option.type.convert(json.dumps({**DRAFTS, "num_speculative_tokens": 99}), option, None)
    with pytest.raises(ConfigError, match=r"--speculative-config num_speculative_tokens must be .* in \[1, 16\], got 99"):
        build(EngineConfig, {"model": "any", "speculative_config": read})
    assert build(EngineConfig, {"model": "any", "speculative_config": DRAFTS}).speculative_config == DRAFTS


def test_lengths_that_are_not_given() -> None:
    def lengths(**given: int) -> tuple[int, int]:
        made = Speculation.of({"method": "ngram", "num_speculative_tokens": 4, **given})
        return made.prompt_lookup_min, made.prompt_lookup_max

    assert lengths() == (2, 5)
    # As at vLLM, one alone stands for both.
    assert lengths(prompt_lookup_min=3) == (3, 3)
    assert lengths(prompt_lookup_max=4) == (4, 4)
    assert Speculation.of(None) is None
