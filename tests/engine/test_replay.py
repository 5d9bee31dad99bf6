"""Steps made again from what was written down give the bits of steps that were not, whatever changes in between."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quire import LLM, LoRARequest, SamplingParams, ops
from quire.engine import replay
from quire.engine.replay import BASE, Replay
from quire.ops.select import selected
from tests.lora.making import LINEAR, save_adapter

pytestmark = pytest.mark.skipif(selected().__name__ != "quire.ops.cpu", reason="only native calls are written down")

SAMPLING = SamplingParams(max_tokens=40, temperature=0.8, seed=3, logprobs=2, ignore_eos=True)
PROMPTS = [[5, 6, 7], [9] * 40, [11, 12], list(range(20, 60))]


def answers(folder: Path, prompts: list[list[int]] = PROMPTS, sampling: SamplingParams = SAMPLING, **options: object) -> list:
    llm = LLM(str(folder), num_gpu_blocks_override=256, max_model_len=512, block_size=16, **options)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    samples = [output.outputs[0] for output in outputs]
    found = [(s.token_ids, [{token: one.logprob for token, one in step.items()} for step in s.logprobs]) for s in samples]
    return [found, llm._engine._runner._forward]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quantization": "int8"},
        {"kv_cache_dtype": "fp8"},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}},
    ],
    ids=str,
)
def test_the_same_answers(tiny_llama: Path, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    found, forward = answers(tiny_llama, **options)
    assert forward._recorded
    assert not forward._refused
    monkeypatch.setattr(replay, "MOST_ROWS", 0)
    expected, forward = answers(tiny_llama, **options)
    assert not forward._recorded
    assert found == expected


@pytest.mark.parametrize("step", [4, 32])
def test_sequences_outgrow_what_was_recorded(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Tables of positions grow at 256, in the middle of a shape or together with the tables of blocks."""
    monkeypatch.setattr(replay, "TABLE_STEP", step)
    prompts, sampling = [[7] * 230], SamplingParams(max_tokens=120, temperature=0, logprobs=1, ignore_eos=True)
    found, forward = answers(tiny_llama, prompts, sampling)
    assert max(recorded.reach for recorded in forward._recorded.values()) == 512
    assert len(forward._recorded) > 1 or step == 32
    assert not forward._refused
    monkeypatch.setattr(replay, "MOST_ROWS", 0)
    assert found == answers(tiny_llama, prompts, sampling)[0]


def test_adapters_come_and_go(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three adapters on two slots: what was written with one that is gone is not used again."""
    folders = [save_adapter(tmp_path / f"a{seed}", tiny_llama, seed, r=4 + seed, targets=LINEAR) for seed in range(3)]
    adapters = [LoRARequest(folder.name, seed + 1, str(folder)) for seed, folder in enumerate(folders)]

    def rounds() -> tuple[list, Replay]:
        llm = LLM(str(tiny_llama), num_gpu_blocks_override=256, max_model_len=512, enable_lora=True, max_loras=2)
        found = []
        for pair in ([0, 1], [1, 2], [0, None], [0, 1]):
            chosen = [None if number is None else adapters[number] for number in pair]
            prompts = [{"prompt_token_ids": p} for p in PROMPTS[:2]]
            outputs = llm.generate(prompts, SAMPLING, lora_request=chosen, use_tqdm=False)
            found.append([(o.outputs[0].token_ids, o.outputs[0].cumulative_logprob) for o in outputs])
        return found, llm._engine._runner._forward

    found, forward = rounds()
    assert {shape[3] for shape in forward._recorded} - {BASE}
    monkeypatch.setattr(replay, "MOST_ROWS", 0)
    assert found == rounds()[0]
    assert found[0] == found[3]


def test_memory_is_bounded(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST_BYTES", 1)
    found, forward = answers(tiny_llama)
    assert len(forward._recorded) == 1
    assert forward._bytes == next(iter(forward._recorded.values())).tape.bytes
    monkeypatch.setattr(replay, "MOST_ROWS", 0)
    assert found == answers(tiny_llama)[0]


def test_torch_in_between_is_noticed() -> None:
    x = torch.randn(3, 8)
    assert ops.record(lambda: ops.add(x, x)).refused is None
    assert "mul" in ops.record(lambda: ops.add(x, x * 2)).refused
    assert ops.record(lambda: ops.add(x.view(8, 3).view(3, 8), x)).refused is None


def test_what_is_recorded_computes_with_what_is_in_memory_then() -> None:
    x, y, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    tape = ops.record(lambda: ops.rms_norm(ops.add(x, y), weight, 1e-6))
    assert tape.refused is None
    x.copy_(torch.randn(3, 8))
    assert torch.equal(tape.replay(), ops.rms_norm(x + y, weight, 1e-6))


def test_writing_steps_down_does_not_import_torchs_compiler() -> None:
    code = (
        "import sys, quire; llm = quire.LLM('quire-tiny', max_model_len=64, kv_cache_memory_bytes=1 << 24);"
        "llm.generate(['a', 'b'], quire.SamplingParams(max_tokens=5), use_tqdm=False);"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
