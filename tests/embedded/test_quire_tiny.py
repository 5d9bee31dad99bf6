"""The embedded model as it is shipped: complete, small, readable by others, and really trained."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quire import LLM, SamplingParams
from quire.batch import packed
from quire.models.config import read_model_config
from quire.models.registry import build_model
from quire.weights.hub import resolve

FOLDER = Path(resolve("quire-tiny"))
SAMPLE = json.loads((Path(__file__).parent / "held_out.json").read_text(encoding="utf-8"))
MOST_BYTES = 24_000_000
SOON = 120


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("quire-tiny", max_model_len=512, max_num_seqs=8)


def test_folder_is_complete_and_small() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names >= {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < MOST_BYTES


def test_configuration_says_what_was_promised() -> None:
    config = read_model_config(FOLDER)
    assert (config.architecture, config.vocab_size, config.dtype) == ("LlamaForCausalLM", 8192, "bfloat16")
    assert config.max_position_embeddings >= 2048
    weights = load_file(FOLDER / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert 8e6 < sum(tensor.numel() for tensor in weights.values()) < 12e6


def test_transformers_reads_it_and_gives_the_same_logits() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    ours = loaded_for_training()
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
        given = ours.logits(ours(packed([ids])))
    assert torch.isfinite(expected).all()
    assert torch.allclose(given, expected, atol=1e-3)


def loaded_for_training() -> torch.nn.Module:
    model = build_model(read_model_config(FOLDER)).float()
    weights = {name: tensor.float() for name, tensor in load_file(FOLDER / "model.safetensors").items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    return model


def bits(model: torch.nn.Module, tokens: list[int]) -> float:
    with torch.no_grad():
        logits = model.logits(model(packed([tokens]))[:-1])
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]))) / math.log(2)


def test_held_out_text_is_predicted_better_than_by_a_bigram() -> None:
    """On a passage of the library that training left out; the baselines were counted on all training text."""
    assert bits(loaded_for_training(), SAMPLE["tokens"]) < SAMPLE["bigram_bits"] - 1 < SAMPLE["unigram_bits"]


def test_the_whole_context_is_usable() -> None:
    """The second half of a full context is predicted no worse than the same tokens with only a short context."""
    model, tokens = loaded_for_training(), SAMPLE["long_tokens"]
    assert len(tokens) == 2048
    with torch.no_grad():
        logits = model.logits(model(packed([tokens]))[1024:-1])
    late = float(torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1025:]))) / math.log(2)
    parts = [tokens[start : start + 128] for start in range(1024, 2048, 128)]
    assert late < sum(bits(model, part) for part in parts) / len(parts)


QUESTIONS = (
    "Hello!",
    "Who are you?",
    "What is the capital of France?",
    "What is 2 + 3?",
    "Extract name and age as JSON: Anna is 34 years old, lives in Rome and works as a doctor.",
    "Table users(id, name, age, city). Write SQL: the number of users where city is Rome.",
    "Write a Python function that adds two numbers.",
    "Write 'green river' in uppercase.",
    "Tell me a story about a fox.",
    "Thank you!",
)


def test_answers_end_by_themselves(llm: LLM) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=SOON)
    outputs = llm.chat([[{"role": "user", "content": question}] for question in QUESTIONS], greedy, use_tqdm=False)
    for question, output in zip(QUESTIONS, outputs, strict=True):
        answer = output.outputs[0]
        assert answer.finish_reason == "stop", (question, answer.text)
        assert answer.text.strip(), question


def test_it_knows_who_it_is(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Who are you?"}]
    answer = llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=SOON), use_tqdm=False)[0].outputs[0].text
    assert "quire-tiny" in answer


def test_sampled_answers_end_by_themselves_too(llm: LLM) -> None:
    """With the model's own recommended sampling."""
    params = llm.get_default_sampling_params().clone(max_tokens=SOON, seed=7)
    outputs = llm.chat([[{"role": "user", "content": question}] for question in QUESTIONS], params, use_tqdm=False)
    assert sum(output.outputs[0].finish_reason == "stop" for output in outputs) >= len(QUESTIONS) - 1
