"""The offline door: prompts of every form, order, defaults, errors, beams, prefix caching as a user sees it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from quire import LLM, BeamSearchParams, SamplingParams
from quire.errors import ConfigError, DoesNotFit, InvalidRequest
from quire.request import RequestOutput

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> LLM:
    return LLM(str(tiny_llama), max_model_len=256)


def run(llm: LLM, prompts: object, params: object = GREEDY) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)


def test_prompt_forms_agree_and_order_is_kept(llm: LLM) -> None:
    text = "the quick brown fox"
    ids = llm.get_tokenizer().encode(text)
    outputs = run(llm, [text, {"prompt": text}, ids, {"prompt_token_ids": ids}, [9, 8, 7]])
    assert len({tuple(output.outputs[0].token_ids) for output in outputs[:4]}) == 1
    assert [output.prompt_token_ids for output in outputs] == [ids] * 4 + [[9, 8, 7]]
    assert outputs[0].prompt == text
    assert outputs[2].prompt is None
    assert all(output.finished and output.outputs[0].finish_reason == "length" for output in outputs)
    assert run(llm, text)[0].outputs[0].token_ids == run(llm, ids)[0].outputs[0].token_ids


def test_parameters_for_each_prompt(llm: LLM) -> None:
    outputs = run(llm, [[5, 6], [5, 6]], [GREEDY, GREEDY.clone(max_tokens=3)])
    assert [len(output.outputs[0].token_ids) for output in outputs] == [8, 3]
    with pytest.raises(InvalidRequest, match="as many as the 2 prompts, got 1"):
        run(llm, [[5], [6]], [GREEDY])


def test_chat_renders_the_models_template(llm: LLM) -> None:
    (output,) = llm.chat([{"role": "user", "content": "hi"}], GREEDY, use_tqdm=False)
    assert output.prompt == "<|user|>hi</s><|assistant|>"


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], GREEDY, "at least one token"),
        ([400], GREEDY, "outside the vocabulary of 320"),
        ([5] * 256, GREEDY, "max_model_len is 256"),
        ([5], SamplingParams(logprobs=21), "Requested sample logprobs of 21, which is greater than max allowed: 20"),
        ([5], SamplingParams(allowed_token_ids=[320]), "allowed_token_ids contain out-of-vocab"),
        ([5], SamplingParams(truncate_prompt_tokens=300), "at most 255"),
        ([5] * 250, SamplingParams(min_tokens=10), "min_tokens must be at most 6"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_and_harms_nobody(
    llm: LLM, prompt: list[int], params: SamplingParams, message: str
) -> None:
    before = run(llm, [[5, 6, 7]])[0].outputs[0].token_ids
    with pytest.raises(InvalidRequest, match=message):
        run(llm, [{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": prompt}], params)
    assert not llm._engine.has_work()
    assert run(llm, [[5, 6, 7]])[0].outputs[0].token_ids == before


def test_truncation_keeps_the_end(llm: LLM) -> None:
    (output,) = run(llm, [list(range(2, 60))], GREEDY.clone(truncate_prompt_tokens=5))
    assert output.prompt_token_ids == list(range(55, 60))
    (output,) = run(llm, [[7] * 400], GREEDY.clone(truncate_prompt_tokens=-1))
    assert len(output.prompt_token_ids) == 255
    assert len(output.outputs[0].token_ids) == 1


def test_length_ends_at_max_model_len(llm: LLM) -> None:
    (output,) = run(llm, [[5] * 250], GREEDY.clone(max_tokens=None))
    assert len(output.outputs[0].token_ids) == 6
    assert output.outputs[0].finish_reason == "length"


def test_stop_tokens_and_min_tokens(llm: LLM) -> None:
    first = run(llm, [[9, 8, 7]])[0].outputs[0].token_ids
    stop = first[2]
    (output,) = run(llm, [[9, 8, 7]], GREEDY.clone(stop_token_ids=[stop]))
    sample = output.outputs[0]
    assert (sample.token_ids, sample.finish_reason, sample.stop_reason) == (first[: first.index(stop) + 1], "stop", stop)
    (held,) = run(llm, [[9, 8, 7]], GREEDY.clone(stop_token_ids=[stop], min_tokens=6))
    assert len(held.outputs[0].token_ids) >= 6
    assert stop not in held.outputs[0].token_ids[:6]


def test_stop_strings_trim_the_text(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=40, ignore_eos=True)
    text = run(llm, ["the fox"], params)[0].outputs[0].text
    stop = text[5:7]
    (output,) = run(llm, ["the fox"], params.clone(stop=[stop]))
    sample = output.outputs[0]
    assert sample.text == text[: text.index(stop)]
    assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)
    (kept,) = run(llm, ["the fox"], params.clone(stop=[stop], include_stop_str_in_output=True))
    assert kept.outputs[0].text == text[: text.index(stop) + 2]


def test_logprobs_have_the_chosen_token_and_its_rank(llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, seed=1, max_tokens=12, logprobs=2, prompt_logprobs=1)
    (output,) = run(llm, [[9, 8, 7, 6]], params)
    sample = output.outputs[0]
    for token, entries in zip(sample.token_ids, sample.logprobs, strict=True):
        assert token in entries
        assert 2 <= len(entries) <= 3
        ranks = sorted(entry.rank for entry in entries.values())
        assert ranks[:2] == [1, 2]
    chosen = [entries[token].logprob for token, entries in zip(sample.token_ids, sample.logprobs, strict=True)]
    assert sample.cumulative_logprob == pytest.approx(sum(chosen), rel=1e-12)
    assert output.prompt_logprobs[0] is None
    assert [token in entries for token, entries in zip([8, 7, 6], output.prompt_logprobs[1:], strict=True)] == [True] * 3


def test_prompt_logprobs_equal_transformers(llm: LLM, tiny_llama: Path) -> None:
    ids = [9, 8, 7, 6] * 20
    (output,) = run(llm, [ids], GREEDY.clone(prompt_logprobs=0))
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    for position, token in enumerate(ids[1:]):
        assert output.prompt_logprobs[position + 1][token].logprob == pytest.approx(expected[position, token].item(), abs=1e-4)


def test_n_samples_share_one_prompt_and_differ(llm: LLM) -> None:
    params = SamplingParams(n=4, temperature=1.0, seed=11, max_tokens=10)
    (output,) = run(llm, [list(range(2, 40))], params)
    assert [sample.index for sample in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(sample.token_ids) for sample in output.outputs}) == 4
    (alone,) = run(llm, [list(range(2, 40))], params.clone(n=1))
    assert alone.outputs[0].token_ids == output.outputs[0].token_ids


def test_prefix_cache_is_used_and_salted(tiny_llama: Path) -> None:
    llm = LLM(str(tiny_llama))
    prompt = list(range(2, 60))
    assert [run(llm, [prompt])[0].num_cached_tokens for _ in range(2)] == [0, 48]
    assert llm.reset_prefix_cache()
    assert run(llm, [prompt])[0].num_cached_tokens == 0


@pytest.mark.parametrize("width", [1, 3, 5])
def test_beams_equal_transformers(llm: LLM, tiny_llama: Path, width: int) -> None:
    prompts = [[9, 8, 7], list(range(20, 50))]
    found = llm.beam_search(prompts, BeamSearchParams(beam_width=width, max_tokens=20, ignore_eos=True))
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for prompt, output in zip(prompts, found, strict=True):
        expected = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=20,
            num_beams=width,
            num_return_sequences=width,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert [beam.tokens for beam in output.sequences] == expected.tolist()
    assert llm._engine.scheduler.pool.num_held == 0


def test_beams_in_a_small_pool_equal_those_in_a_large_one(llm: LLM, tiny_llama: Path) -> None:
    small = LLM(str(tiny_llama), max_model_len=96, num_gpu_blocks_override=8, max_num_batched_tokens=16, max_num_seqs=3)
    params = BeamSearchParams(beam_width=4, max_tokens=30, ignore_eos=True)
    prompts = [[9, 8, 7] * 15, [5, 6] * 20]
    assert [[beam.tokens for beam in output.sequences] for output in small.beam_search(prompts, params)] == [
        [beam.tokens for beam in output.sequences] for output in llm.beam_search(prompts, params)
    ]
    assert small._engine.scheduler.counters.preemptions > 0


def test_defaults_come_from_the_models_files(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_llama.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "generation_config.json").write_text('{"temperature": 0.3, "top_k": 7, "eos_token_id": [1, 9]}')
    llm = LLM(str(folder), override_generation_config={"top_k": 5})
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.top_k) == (0.3, 5)
    assert LLM(str(folder), generation_config="vllm").get_default_sampling_params().temperature == 1.0
    biased = SamplingParams(temperature=0, logit_bias={9: 100}, max_tokens=5)
    (output,) = run(llm, [[5]], biased)
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", 9)


def test_wrong_options_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match='Did you mean "max_num_seqs"'):
        LLM(str(tiny_llama), max_num_seq=3)
    with pytest.raises(ConfigError, match="trust_remote_code=True is not possible: no code"):
        LLM(str(tiny_llama), trust_remote_code=True)
    with pytest.raises(ConfigError, match="block_size must divide 128, got 24"):
        LLM(str(tiny_llama), block_size=24)
    with pytest.raises(DoesNotFit, match="does not fit"):
        LLM(str(tiny_llama), kv_cache_memory_bytes=20000, max_model_len=512)


def test_preemptions_are_explained_with_values(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("quire.engine.stats.INTERVAL", 0.0)
    llm = LLM(str(tiny_llama), max_model_len=128, num_gpu_blocks_override=16)
    run(llm, [[number + 2] * 20 for number in range(12)], GREEDY.clone(max_tokens=60))
    (advice, *_) = [record.getMessage() for record in caplog.records if "preemptions in" in record.getMessage()]
    # 20 + 60 tokens are 5 blocks a request: 12 of them need 60, and 16 blocks are enough for 3.
    assert "12 sequences may need 60 KV blocks, there are 16" in advice
    assert f"--kv-cache-memory-bytes {61 * llm.plan.bytes_per_block} or --max-num-seqs 3 " in advice
