"""A KV cache of one byte per number through the whole engine: the same bits in a crowd as alone, and answers as good."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire import LLM, SamplingParams
from quire.engine.calibration import LENGTH, MARGIN, calibration_tokens, observed_bounds, scales_of
from quire.errors import ConfigError, ModelError
from tests.conftest import write_model
from tests.engine.test_same_request_same_bits import draw_requests, facts, run_crowd

TYPES = ("fp8", "fp8_e5m2", "int8")
TORCH = {"fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2, "int8": torch.int8}
HELD_OUT = json.loads((Path(__file__).parents[1] / "embedded" / "held_out.json").read_text())
REQUESTS = 60


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_requests_in_a_crowd_equal_their_solo_runs(tiny_llama: Path, kind: str) -> None:
    """Chunks, prefix hits, preemption with recomputing, shared and copied blocks, aborts."""
    rng = random.Random(2)
    requests = draw_requests(rng)[:REQUESTS]
    options = {"kv_cache_dtype": kind, "calculate_kv_scales": True, "max_model_len": 192, "dtype": "bfloat16"}
    crowd = LLM(str(tiny_llama), max_num_batched_tokens=64, max_num_seqs=24, num_gpu_blocks_override=24, **options)
    solo = LLM(str(tiny_llama), enable_prefix_caching=False, **options)
    outputs, aborted = run_crowd(crowd, requests, rng)

    counters = crowd._engine.scheduler.counters
    assert counters.preemptions > 5
    assert counters.prefix_hits > 100
    assert crowd._engine.scheduler.pool.num_held == 0
    for number, (prompt, params) in enumerate(requests):
        if f"r{number}" in aborted:
            continue
        (expected,) = solo.generate([prompt], params, use_tqdm=False)
        got = outputs[f"r{number}"]
        assert [facts(sample) for sample in got.outputs] == [facts(sample) for sample in expected.outputs], number
        assert got.prompt_logprobs == expected.prompt_logprobs, number


@pytest.mark.parametrize("kind", TYPES)
def test_the_cache_has_the_type_and_the_plan_says_so(tiny_llama: Path, kind: str) -> None:
    full, half = (LLM(str(tiny_llama), kv_cache_memory_bytes=1 << 22, kv_cache_dtype=name) for name in ("auto", kind))
    kv = half._engine._runner.kv
    assert {layer.dtype for layer in (*kv.keys, *kv.values)} == {TORCH[kind]}
    assert sum(layer.numel() for layer in (*kv.keys, *kv.values)) == half.plan.kv_bytes <= 1 << 22
    assert half.plan.kv_tokens >= 4 * full.plan.kv_tokens  # of float32
    assert full._engine._runner.kv.scales is None


def perplexity(llm: LLM, prompts: list[list[int]]) -> float:
    outputs = llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    found = [
        entry[token].logprob
        for output, prompt in zip(outputs, prompts, strict=True)
        for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
    ]
    return math.exp(-sum(found) / len(found))


def test_held_out_text_is_predicted_as_well() -> None:
    """The bound of half a percent, on library text that neither training nor the calibration has seen."""
    long = HELD_OUT["long_tokens"]
    prompts = [HELD_OUT["tokens"], *(long[start : start + 512] for start in (0, 1024))]
    expected = perplexity(LLM("quire-tiny"), prompts)
    for kind in TYPES:
        found = perplexity(LLM("quire-tiny", kv_cache_dtype=kind, calculate_kv_scales=True), prompts)
        assert abs(found / expected - 1) < 0.005, (kind, found, expected)


def test_scales_are_fixed_before_the_first_request_and_at_every_start(tiny_llama: Path) -> None:
    first = LLM(str(tiny_llama), kv_cache_dtype="int8", threads=1)
    second = LLM(str(tiny_llama), kv_cache_dtype="int8", threads=2, max_model_len=40, max_num_batched_tokens=19)
    before = [scale.clone() for scale in first._engine._runner.kv.scales]
    first.generate([[5, 9, 200] * 30], SamplingParams(max_tokens=5), use_tqdm=False)
    for ours, kept, theirs in zip(first._engine._runner.kv.scales, before, second._engine._runner.kv.scales, strict=True):
        assert ours.shape == (2, 2)
        assert ours.dtype == torch.float32
        assert torch.equal(ours, kept)
        assert torch.equal(ours, theirs)
    assert not torch.equal(before[0][0], before[0][1])


def test_calibrated_scales_leave_a_margin_over_what_was_observed(tiny_llama: Path) -> None:
    """At any position: the observed bound holds for a key that is turned by other angles."""
    llm = LLM(str(tiny_llama))
    sequences = calibration_tokens(llm.get_tokenizer(), llm.model_config)
    assert sum(map(len, sequences)) > 3 * LENGTH
    model = llm._engine._runner.model
    bounds = observed_bounds(model, sequences, torch.float32)
    for dtype, largest in ((torch.int8, 127), (torch.float8_e4m3fn, 448), (torch.float8_e5m2, 57344)):
        for bound, scale in zip(bounds, scales_of(bounds, dtype), strict=True):
            assert torch.allclose(scale * largest, bound * MARGIN)
    assert scales_of([torch.tensor([[0.0, math.nan], [math.inf, 1.0]])], torch.int8)[0].tolist()[0] == [1.0, 1.0]
    for bound, in_pieces in zip(bounds, observed_bounds(model, sequences, torch.float32, 33), strict=True):
        assert torch.equal(bound, in_pieces)


NAMES = (
    ("model.layers.{}.self_attn.k_scale", "model.layers.{}.self_attn.v_scale"),
    ("model.layers.{}.self_attn.attn.k_scale", "model.layers.{}.self_attn.attn.v_scale"),
    ("model.layers.{}.self_attn.k_proj.k_scale", "model.layers.{}.self_attn.v_proj.v_scale"),
    ("model.layers.{}.self_attn.k_proj.output_scale", "model.layers.{}.self_attn.v_proj.output_scale"),
)


def with_scales(folder: Path, scales: dict[str, torch.Tensor]) -> str:
    write_model(folder)
    save_file({**load_file(folder / "model.safetensors"), **scales}, folder / "model.safetensors")
    return str(folder)


@pytest.mark.parametrize("names", NAMES)
def test_a_checkpoints_scales_are_used(tmp_path: Path, names: tuple[str, str]) -> None:
    scales = {name.format(layer): torch.tensor(0.25 + layer + row) for layer in range(3) for row, name in enumerate(names)}
    scales[names[1].format(2)] = torch.tensor([0.5, 0.75])  # one for each head
    folder = with_scales(tmp_path / "m", scales)
    llm = LLM(folder, kv_cache_dtype="fp8")
    assert [scale.tolist() for scale in llm._engine._runner.kv.scales] == [
        [[0.25, 0.25], [1.25, 1.25]], [[1.25, 1.25], [2.25, 2.25]], [[2.25, 2.25], [0.5, 0.75]],
    ]  # fmt: skip
    assert llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3), use_tqdm=False)[0].outputs[0].token_ids
    assert LLM(folder, kv_cache_dtype="int8")._engine._runner.kv.scales[0][0, 0] != 0.25
    assert LLM(folder, kv_cache_dtype="fp8", calculate_kv_scales=True)._engine._runner.kv.scales[0][0, 0] != 0.25
    assert LLM(folder)._engine._runner.kv.scales is None


def test_one_scale_for_both_and_none_at_all(tmp_path: Path, tiny_llama: Path) -> None:
    folder = with_scales(tmp_path / "m", {"model.layers.1.self_attn.kv_scale": torch.tensor([0.125])})
    scales = LLM(folder, kv_cache_dtype="fp8")._engine._runner.kv.scales
    assert [scale.unique().tolist() for scale in scales] == [[1.0], [0.125], [1.0]]
    scales = LLM(str(tiny_llama), kv_cache_dtype="fp8_e5m2")._engine._runner.kv.scales
    assert all(bool((scale == 1).all()) for scale in scales)


@pytest.mark.parametrize(
    "scale, message",
    [
        (torch.tensor(-1.0), r"model\.layers\.0\.self_attn\.k_scale' of model\.safetensors must be positive, got \[-1\.0\]"),
        (torch.tensor(math.nan), "must be positive"),
        (torch.ones(3), r"must hold 1 number, or 2 for the heads, got \[3\] of F32"),
    ],
)
def test_damaged_scales_are_refused(tmp_path: Path, scale: torch.Tensor, message: str) -> None:
    folder = with_scales(tmp_path / "m", {"model.layers.0.self_attn.k_scale": scale})
    with pytest.raises(ModelError, match=message):
        LLM(folder, kv_cache_dtype="fp8")


def test_wishes_that_cannot_be_granted() -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_dtype must be one of auto, fp8, .* got 'fp8_e4m4'. Did you mean"):
        LLM("quire-tiny", kv_cache_dtype="fp8_e4m4")
    with pytest.raises(ConfigError, match=r"calculate_kv_scales needs a kv_cache_dtype of fp8, .* got 'auto'"):
        LLM("quire-tiny", calculate_kv_scales=True)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_drafts_change_nothing(tiny_llama: Path, kind: str) -> None:
    """Keys of drafts that were wrong lie in the cache until the right ones take their places."""
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    prompts = [[5, 9, 200, 31] * 12, [7, 8] * 9]
    params = SamplingParams(temperature=0.3, seed=3, max_tokens=60, logprobs=1, ignore_eos=True)
    found = []
    for config in (None, drafts):
        llm = LLM(str(tiny_llama), kv_cache_dtype=kind, calculate_kv_scales=True, speculative_config=config)
        found.append([facts(output.outputs[0]) for output in llm.generate(prompts, params, use_tqdm=False)])
        drafted = llm._engine.scheduler.speculated.draft_tokens
    assert found[0] == found[1]
    assert drafted > 0
