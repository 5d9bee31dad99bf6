"""Requests of different adapters, ranks and the base in one batch: each gets what it gets alone, whatever is loaded, replaced
or removed meanwhile."""

from __future__ import annotations

import gc
import json
import random
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from quire import LLM, BeamSearchParams, LoRARequest, SamplingParams
from quire.config import EngineConfig
from quire.engine.builder import build
from quire.errors import ConfigError, InvalidRequest, NotFound
from quire.request import RequestOutput, RequestOutputKind
from tests.engine.test_same_request_same_bits import DRAFTS, draw_requests, facts
from tests.lora.making import LINEAR, save_adapter

KINDS: list[dict[str, Any]] = [
    {"r": 1},
    {"r": 4, "targets": LINEAR},
    {"r": 8, "targets": ("q_proj", "v_proj", "down_proj")},
    {"r": 13, "targets": LINEAR},
    {"r": 16},
    {"r": 3, "targets": ("lm_head", "o_proj")},
]
NAMES = ["", *(f"a{number}" for number in range(len(KINDS)))]
REQUESTS = 90


@pytest.fixture(scope="module")
def folders(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("adapters")
    return {f"a{seed}": save_adapter(place / f"a{seed}", tiny_llama, seed, **kind) for seed, kind in enumerate(KINDS)}


def lora(name: str, folders: dict[str, Path]) -> LoRARequest | None:
    return LoRARequest(name, 1, str(folders[name])) if name else None


def small(tiny_llama: Path, **options: Any) -> LLM:
    """An engine that is short of everything: blocks, tokens, slots and memory for adapters."""
    given = {
        "max_model_len": 192, "max_num_batched_tokens": 64, "max_num_seqs": 24, "num_gpu_blocks_override": 40,
        "enable_lora": True, "max_loras": 3, "max_cpu_loras": 4, **options,
    }  # fmt: skip
    return LLM(str(tiny_llama), **given)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def alone(
    request: pytest.FixtureRequest, tiny_llama: Path, folders: dict[str, Path]
) -> tuple[str, list[tuple[list[int], SamplingParams, str]], list[RequestOutput]]:
    """(dtype, the requests with their adapters, the output of each when it has the engine for itself)."""
    rng = random.Random(5)
    requests = [(prompt, params, rng.choice(NAMES)) for prompt, params in draw_requests(rng)[:REQUESTS]]
    solo = LLM(
        str(tiny_llama), dtype=request.param, max_model_len=192, enable_prefix_caching=False, enable_lora=True, max_cpu_loras=6
    )
    run = [
        solo.generate([prompt], params, lora_request=lora(name, folders), use_tqdm=False)[0]
        for prompt, params, name in requests
    ]
    return request.param, requests, run


@pytest.mark.parametrize("drafts", [None, DRAFTS], ids=["one by one", "with drafts"])
def test_requests_in_mixed_company_equal_their_solo_runs(
    tiny_llama: Path, folders: dict[str, Path], alone: Any, drafts: dict[str, object] | None
) -> None:
    dtype, requests, expected = alone
    llm, rng = small(tiny_llama, dtype=dtype, speculative_config=drafts), random.Random(6)
    for name in NAMES[1:]:
        llm.add_adapter(name, folders[name])
    engine, outputs, arriving, more = llm._engine, {}, iter(enumerate(requests)), True
    most_at_once = 0
    while more or engine.has_work():
        for _ in range(rng.choice([0, 1, 2, 8])):
            entry = next(arriving, None)
            more = entry is not None
            if entry is not None:
                number, (prompt, params, name) = entry
                request = LoRARequest(name) if name else None
                accepted = llm._intake.accept(prompt, params, f"r{number}", arrival_time=time.monotonic(), lora_request=request)
                engine.add(accepted)
        for output in engine.step():
            outputs[output.request_id] = output
        engine.scheduler.pool.check()
        most_at_once = max(most_at_once, len(engine.scheduler.adapters()[0]))
    assert most_at_once == 3
    assert engine.scheduler.counters.preemptions > 5
    assert engine.scheduler.counters.prefix_hits > 100
    assert drafts is None or engine.scheduler.speculated.accepted > 10
    for number, whole in enumerate(expected):
        got = outputs[f"r{number}"]
        assert [facts(sample) for sample in got.outputs] == [facts(sample) for sample in whole.outputs], number
        assert got.prompt_logprobs == whole.prompt_logprobs, number
    assert engine.scheduler.pool.num_held == 0
    assert not llm.adapters._queue
    assert all(content.uses == 0 for content in llm.adapters._contents.values())


def test_batches_of_the_base_alone_know_no_adapters(tiny_llama: Path, folders: dict[str, Path]) -> None:
    llm, params = small(tiny_llama), SamplingParams(temperature=0, max_tokens=6, logprobs=2)
    plain = LLM(str(tiny_llama), max_model_len=192)
    llm.add_adapter("a1", folders["a1"])
    seen = []

    def spy(*given: Any) -> Any:
        made = build(*given)
        seen.append(made[0].adapters)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quire.engine.runner.build", spy)
        (base,) = llm.generate([[5, 6, 7]], params, use_tqdm=False)
        assert seen
        assert all(adapters is None for adapters in seen)
        llm.generate([[5, 6, 7], [5, 6]], params, lora_request=[LoRARequest("a1"), None], use_tqdm=False)
    assert seen[-1].tolist() in ([0, -1], [-1, 0])
    (expected,) = plain.generate([[5, 6, 7]], params, use_tqdm=False)
    assert facts(base.outputs[0]) == facts(expected.outputs[0])


def test_an_adapter_whose_b_is_zero_is_the_base(tiny_llama: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(folders["a1"] / "adapter_model.safetensors")
    save_file({k: t * 0 if "lora_B" in k else t for k, t in tensors.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((folders["a1"] / "adapter_config.json").read_text())
    for dtype in ("float32", "bfloat16"):
        llm, params = small(tiny_llama, dtype=dtype), SamplingParams(temperature=1, seed=3, max_tokens=20, logprobs=3)
        base, zero = llm.generate(
            [[5, 6, 7]] * 2, params, lora_request=[None, LoRARequest("z", 1, str(tmp_path))], use_tqdm=False
        )
        assert facts(base.outputs[0]) == facts(zero.outputs[0])


def test_the_same_name_with_new_weights_reads_no_old_keys(tiny_llama: Path, folders: dict[str, Path]) -> None:
    llm, params, prompt = small(tiny_llama), SamplingParams(temperature=0, max_tokens=8, logprobs=1), list(range(3, 100))
    fresh = {
        name: small(tiny_llama).generate([prompt], params, lora_request=lora(name, folders), use_tqdm=False)[0]
        for name in ("a1", "a3")
    }
    cached = []
    for name in ("a1", "a1", "a3", "a3", "a1"):
        llm.add_adapter("one", folders[name], replace=True)
        (output,) = llm.generate([prompt], params, lora_request=LoRARequest("one"), use_tqdm=False)
        assert facts(output.outputs[0]) == facts(fresh[name].outputs[0])
        cached.append(output.num_cached_tokens)
    # Content is identity: what came back under the name finds its own keys again.
    assert cached == [0, 96, 0, 96, 96]
    (other,) = llm.generate([prompt], params, lora_request=lora("a1", folders), use_tqdm=False)
    assert other.num_cached_tokens == 96
    (base,) = llm.generate([prompt], params, use_tqdm=False)
    assert base.num_cached_tokens == 0


def test_beams_samples_and_scores_go_through_the_adapter(tiny_llama: Path, folders: dict[str, Path]) -> None:
    llm, prompts = small(tiny_llama), [[7, 8, 9], [4, 5]]
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    beams = BeamSearchParams(beam_width=1, max_tokens=6, ignore_eos=True)
    requests = [lora("a1", folders), lora("a3", folders)]
    expected = llm.generate(prompts, greedy, lora_request=requests, use_tqdm=False)
    found = llm.beam_search(prompts, beams, lora_request=requests)
    assert [beam.sequences[0].tokens for beam in found] == [
        [*output.prompt_token_ids, *output.outputs[0].token_ids] for output in expected
    ]
    # The score of a prompt is that of drawing it.
    whole = found[0].sequences[0].tokens
    scores = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    (scored,) = llm.generate([whole], scores, lora_request=requests[0], use_tqdm=False)
    drawn = llm.generate([prompts[0]], greedy.clone(logprobs=0), lora_request=requests[0], use_tqdm=False)[0].outputs[0]
    assert scored.prompt_logprobs[3:] == drawn.logprobs
    (base,) = llm.generate([whole], scores, use_tqdm=False)
    assert base.prompt_logprobs != scored.prompt_logprobs
    samples = SamplingParams(n=3, temperature=1, seed=1, max_tokens=5)
    (several,) = llm.generate([prompts[0]], samples, lora_request=requests[0], use_tqdm=False)
    (one,) = llm.generate([prompts[0]], samples.clone(n=1), lora_request=requests[0], use_tqdm=False)
    assert several.outputs[0].token_ids == one.outputs[0].token_ids
    assert several.lora_request is requests[0]
    assert {sample.lora_request for sample in several.outputs} == {requests[0]}


def test_management_as_in_peft(tiny_llama: Path, folders: dict[str, Path]) -> None:
    llm, params = small(tiny_llama, max_lora_rank=32), SamplingParams(temperature=0, max_tokens=8)

    def tokens(adapter: LoRARequest | None = None) -> list[int]:
        return llm.generate([[5, 6, 7]], params, lora_request=adapter, use_tqdm=False)[0].outputs[0].token_ids

    base = tokens()
    llm.add_adapter("first", folders["a1"])
    llm.add_adapter("second", str(folders["a3"]))
    assert (llm.list_adapters(), llm.active_adapter, tokens()) == (["first", "second"], None, base)
    llm.set_adapter("first")
    first = tokens()
    assert first == tokens(LoRARequest("first")) != base
    with llm.disable_adapter():
        assert tokens() == base
        assert tokens(LoRARequest("second")) not in (base, first)
    assert tokens() == first
    llm.combine("half", {"first": 0.5, "second": 0.5}, "cat")
    llm.add_weighted_adapter(["first"], [1.0], "same", "cat")
    assert tokens(LoRARequest("same")) == first
    assert tokens(LoRARequest("half")) not in (base, first)
    with pytest.raises(InvalidRequest, match="already been loaded"):
        llm.add_adapter("first", folders["a3"])
    llm.delete_adapter("first")
    assert (llm.active_adapter, tokens()) == (None, base)
    for call in (llm.set_adapter, llm.delete_adapter, lambda name: tokens(LoRARequest(name))):
        with pytest.raises(NotFound, match="first"):
            call("first")


def test_requests_register_their_folders(tiny_llama: Path, folders: dict[str, Path]) -> None:
    llm, params = small(tiny_llama), SamplingParams(temperature=0, max_tokens=6)
    (one,) = llm.generate([[5, 6]], params, lora_request=LoRARequest("x", 1, str(folders["a1"])), use_tqdm=False)
    (same,) = llm.generate([[5, 6]], params, lora_request=LoRARequest("x", 2, str(folders["a3"])), use_tqdm=False)
    assert same.outputs[0].token_ids == one.outputs[0].token_ids
    new = LoRARequest("x", 2, str(folders["a3"]), load_inplace=True)
    (changed,) = llm.generate([[5, 6]], params, lora_request=new, use_tqdm=False)
    assert changed.outputs[0].token_ids != one.outputs[0].token_ids
    assert new == LoRARequest("x")
    assert new.adapter_id == 2
    with pytest.raises(InvalidRequest, match="as many as the 2 prompts, got 1"):
        llm.generate([[5], [6]], params, lora_request=[new], use_tqdm=False)
    with pytest.raises(InvalidRequest, match="id must be > 0, got 0"):
        LoRARequest("x", 0)
    with pytest.raises(ConfigError, match="enable_lora"):
        LLM(str(tiny_llama)).generate([[5]], params, lora_request=new, use_tqdm=False)


def test_a_conversation_is_written_by_the_adapters_template(tiny_llama: Path, tmp_path: Path) -> None:
    template = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    save_adapter(tmp_path / "own", tiny_llama, 3, files={"chat_template.jinja": template})
    llm, params = small(tiny_llama), SamplingParams(temperature=0, max_tokens=2)
    own = LoRARequest("own", 1, str(tmp_path / "own"))
    conversation = [{"role": "user", "content": "hi"}]
    outputs = llm.chat([conversation] * 2, params, use_tqdm=False, lora_request=[own, None])
    assert [output.prompt for output in outputs] == ["[hi]", "<|user|>hi</s><|assistant|>"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_loras": 2}, "max_loras needs enable_lora"),
        ({"enable_lora": True, "max_loras": 0}, "max_loras must be a whole number at least 1, got 0"),
        ({"enable_lora": True, "max_lora_rank": 17}, "max_lora_rank must be one of 1, 8, 16, .* got 17"),
        ({"enable_lora": True, "max_loras": 4, "max_cpu_loras": 2}, "max_cpu_loras must be at least max_loras=4, got 2"),
        ({"enable_lora": True, "lora_dtype": "bfloat16"}, "lora_dtype must be one of auto, float32"),
    ],
)
def test_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineConfig(model="m", **options)


def test_nothing_keeps_a_removed_adapter(tiny_llama: Path, folders: dict[str, Path]) -> None:
    """Not its slot, and not the steps that were written down with it."""
    llm = small(tiny_llama)
    llm.add_adapter("a1", folders["a1"])
    part = next(iter(llm.adapters.adapter("a1").parts.values()))
    watched, part = weakref.ref(part.a), None
    llm.generate([[5, 6]], SamplingParams(temperature=0, max_tokens=20), lora_request=LoRARequest("a1"), use_tqdm=False)
    llm.delete_adapter("a1")
    assert llm._engine._runner.adapters.num_used == 0
    gc.collect()
    assert watched() is None


def test_a_dropped_llm_is_gone(tiny_llama: Path, folders: dict[str, Path]) -> None:
    llm = small(tiny_llama, max_loras=1, max_cpu_loras=1)
    for name in ("a0", "a1"):
        llm.add_adapter(name, folders[name])
    llm.generate([[5]] * 2, SamplingParams(max_tokens=2), lora_request=[LoRARequest("a0"), LoRARequest("a1")], use_tqdm=False)
    thread, model = llm.adapters._thread, weakref.ref(llm._engine._runner.model)
    assert thread is not None
    assert thread.is_alive()
    del llm
    thread.join(timeout=10)
    gc.collect()
    assert model() is None


# -- storms ---------------------------------------------------------------------------------------------------------------


def copied(folder: Path, source: Path, number: int) -> Path:
    """An adapter's folder of other content, made without waiting for the disk."""
    folder.mkdir()
    tensors = load_file(source / "adapter_model.safetensors")
    save_file({name: tensor * (1 + number / 64) for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    return folder


def run_until_idle(llm: LLM, on_output: Callable[[RequestOutput], None], turn: Callable[[], bool]) -> None:
    """Steps, with `turn` before each, until it says that nothing more comes and all is done."""
    while turn() or llm._engine.has_work():
        for output in llm._engine.step():
            on_output(output)


def test_storm_of_loads_and_removals(tiny_llama: Path, folders: dict[str, Path]) -> None:
    """Names are loaded, replaced and removed while requests run. Each answer is that of a content which its name stood for
    between its arrival and its end, or says that the name was gone."""
    rng, params = random.Random(11), SamplingParams(temperature=0, max_tokens=12, output_kind=RequestOutputKind.FINAL_ONLY)
    prompts = [[rng.randrange(2, 320) for _ in range(length)] for length in (3, 20, 40)]
    solo = small(tiny_llama)
    answers = {
        (place, name): solo.generate([prompt], params, lora_request=lora(name, folders), use_tqdm=False)[0].outputs[0].token_ids
        for place, prompt in enumerate(prompts)
        for name in NAMES
    }
    llm = small(tiny_llama, max_loras=2, max_cpu_loras=2, speculative_config=DRAFTS)
    meaning: dict[str, str] = {}
    possible: dict[str, tuple[int, set[str]]] = {}
    gone = changed = answered = 0
    left = 400

    def turn() -> bool:
        nonlocal left, changed
        left -= 1
        if left < 0:
            return False
        name = f"n{rng.randrange(4)}"
        act = rng.random()
        if act < 0.15:
            content = rng.choice(NAMES[1:])
            llm.add_adapter(name, folders[content], replace=True)
            meaning[name] = content
            changed += 1
            for _, contents in (entry for id, entry in possible.items() if id.startswith(f"{name}-")):
                contents.add(content)
        elif act < 0.2 and name in meaning:
            llm.delete_adapter(name)
            del meaning[name]
            for _, contents in (entry for id, entry in possible.items() if id.startswith(f"{name}-")):
                contents.add("gone")
        elif act < 0.6 and name in meaning:
            place = rng.randrange(3)
            id = f"{name}-{left}"
            request = llm._intake.accept(
                prompts[place], params, id, arrival_time=time.monotonic(), lora_request=LoRARequest(name)
            )
            llm._engine.add(request)
            possible[id] = place, {meaning[name]}
            if rng.random() < 0.1:
                llm._engine.abort(id)
                del possible[id]
        return True

    def check(output: RequestOutput) -> None:
        nonlocal gone, answered
        place, contents = possible.pop(output.request_id)
        if output.error is not None:
            assert isinstance(output.error, NotFound), output.error
            assert "gone" in contents
            gone += 1
            return
        answered += 1
        assert output.outputs[0].token_ids in [answers[place, content] for content in contents - {"gone"}]

    run_until_idle(llm, check, turn)
    assert not possible
    assert changed > 30
    assert answered > 80
    for name in list(meaning):
        llm.delete_adapter(name)
    deadline = time.monotonic() + 10
    while llm.adapters.num_in_memory and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (llm.adapters.num_in_memory, llm._engine._runner.adapters.num_used, llm._engine.scheduler.pool.num_held) == (0, 0, 0)


def test_five_hundred_adapters_and_no_failed_request(tiny_llama: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    """Requests after Zipf's law over 500 adapters, of which 16 are in memory and 4 in slots."""
    llm, rng = small(tiny_llama, max_loras=4, max_cpu_loras=16, num_gpu_blocks_override=120), random.Random(3)
    for number in range(500):
        llm.add_adapter(f"n{number}", copied(tmp_path / f"n{number}", folders[f"a{number % 5}"], number))
    assert (len(llm.list_adapters()), llm.adapters.num_in_memory) == (500, 16)
    chosen = rng.choices(range(500), [1 / (rank + 1) for rank in range(500)], k=200)
    assert len(set(chosen)) > 80
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=0)
    outputs = llm.generate(
        [[5, 6, 7]] * 200, params, lora_request=[LoRARequest(f"n{number}") for number in chosen], use_tqdm=False
    )
    assert llm.adapters.num_in_memory <= 16
    scores: dict[int, Any] = {}
    for number, output in zip(chosen, outputs, strict=True):
        assert output.outputs[0].finish_reason == "length" or output.outputs[0].token_ids[-1] == 1
        assert scores.setdefault(number, facts(output.outputs[0])) == facts(output.outputs[0])
    assert len({json.dumps(str(score)) for score in scores.values()}) > 0.9 * len(scores)
