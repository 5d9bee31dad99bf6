"""Fixtures that many rooms' tests share: one tiny Llama with random weights and a byte-level tokenizer, made in a second."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

# One compute thread: the models are tiny, and tests that run side by side must not spin on each other's cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from quire.models.config import parse_model_config
from quire.models.registry import build_model

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 320 tokens with `<s>` 0 and `</s>` 1 and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog, said the other fox to the dog"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    extras = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(extras))


def write_model(folder: Path, seed: int = 0, **changes: object) -> Path:
    """A checkpoint folder of a tiny Llama; `changes` to its config.json. Weights are wide enough to give distinct logits."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    model = build_model(parse_model_config(config))
    weights = {name: value.detach() * (4 if value.dim() > 1 else 1) for name, value in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder)
    return folder


DECISIVE = ("QUIRE_", "OMP_", "MKL_", "MALLOC_", "HF_")


@pytest.fixture(autouse=True)
def environment_stays() -> Iterator[None]:
    """What a test leaves behind in the environment would decide how the programs of later tests run."""
    before = {name: value for name, value in os.environ.items() if name.startswith(DECISIVE)}
    yield
    assert {name: value for name, value in os.environ.items() if name.startswith(DECISIVE)} == before


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny Llama."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny-llama")
