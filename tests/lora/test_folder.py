"""Adapter folders: what is damaged, foreign or half there is refused by name; what is written is whole or not there."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from quire.errors import AdapterError
from quire.lora.adapter import Adapter, read_adapter, write_adapter
from quire.lora.config import LoraConfig
from quire.lora.new import new_adapter
from quire.models.decoder import CausalLM
from tests.lora.conftest import Base

Tensors = dict[str, Tensor]
ATTENTION = "base_model.model.model.layers.0.self_attn"
FILE = "adapter_model.safetensors"


@pytest.fixture
def model(base_of: Callable[[str], Base]) -> CausalLM:
    return base_of("llama-biases")[1]


def adapter_of(model: CausalLM, seed: int = 0, **options: Any) -> Adapter:
    config = LoraConfig(**{"r": 4, "target_modules": ("q_proj", "v_proj"), **options})
    adapter = new_adapter(model, config, seed)
    with torch.no_grad():
        for tensor in adapter.tensors().values():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)))
    return adapter.frozen()


@pytest.fixture
def folder(model: CausalLM, tmp_path: Path) -> Path:
    write_adapter(tmp_path / "adapter", adapter_of(model))
    (tmp_path / "adapter" / "quire.json").unlink()  # the tests change the files that it has hashes of
    return tmp_path / "adapter"


def without(key: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.pop(f"{ATTENTION}.{key}")


def with_tensor(key: str, *shape: int, value: float = 1.0, dtype: torch.dtype = torch.float32) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(key, torch.full(shape, value).to(dtype))


@pytest.mark.parametrize(
    "change,said",
    [
        (without("q_proj.lora_A.weight"), ["q_proj.lora_B.weight", "without its A"]),
        (without("v_proj.lora_B.weight"), ["v_proj.lora_A.weight", "without its B"]),
        (with_tensor(f"{ATTENTION}.q_proj.lora_A.weight", 4, 48, value=float("nan")), ["q_proj.lora_A", "not finite"]),
        (with_tensor(f"{ATTENTION}.q_proj.lora_B.weight", 48, 4, value=float("inf")), ["q_proj.lora_B", "not finite"]),
        (with_tensor(f"{ATTENTION}.q_proj.lora_A.weight", 4, 64), ["[4, 64]", "expected [4, 48]", "base model"]),
        (with_tensor(f"{ATTENTION}.q_proj.lora_A.weight", 8, 48), ["[8, 48]", "expected [4, 48]", "rank 4"]),
        (with_tensor(f"{ATTENTION}.q_proj.lora_A.weight", 4, 48, dtype=torch.int8), ["torch.int8", "floating"]),
        (with_tensor(f"{ATTENTION}.z_proj.lora_A.weight", 4, 48), ["z_proj", "Did you mean"]),
        (with_tensor(f"{ATTENTION}.k_proj.lora_A.weight", 4, 48), ["k_proj.lora_A", "without its B"]),
        (with_tensor("model.layers.0.self_attn.k_proj.lora_A.weight", 4, 48), ["not one of LoRA's", "base_model.model."]),
        (with_tensor(f"{ATTENTION}.q_proj.lora_C.weight", 4, 48), ["lora_C"]),
        (with_tensor("base_model.model.model.norm.weight", 48), ["model.norm", "modules_to_save does not name it"]),
        (with_tensor("base_model.model.model.norm.weight", 49), ["model.norm", "[49]", "expected [48]"]),
        (with_tensor("base_model.model.model.norm.bias", 48), ["the base's model.norm has none"]),
        (with_tensor("base_model.model.model.norm.lora_B.bias", 48), ["norm.lora_B.bias", "lora_bias"]),
        (with_tensor("base_model.model.model.layers.0.weight", 48), ["layers.0", "only linear layers, embeddings and norms"]),
        (with_tensor(f"{ATTENTION}.q_proj.lora_magnitude_vector", 48), ["use_dora"]),
        (with_tensor(f"{ATTENTION}.q_proj.lora_B.bias", 48), ["lora_bias"]),
        (with_tensor(f"{ATTENTION}.q_proj.base_layer.bias", 48), ["has a bias", "'none'"]),
        (with_tensor(f"{ATTENTION}.k_proj.weight", 12, 48), ["k_proj", "modules_to_save"]),
        (with_tensor("base_model.model.lm_head.bias", 97), ["the base's lm_head has none"]),
        (with_tensor("base_model.model.model.embed_tokens.lora_A.weight", 4, 48), ["embedding"]),
        (with_tensor("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", 1, 48), ["trainable_token"]),
        (
            lambda tensors: [tensors.pop(key) for key in list(tensors) if ".layers.2." in key],
            ["model.layers.2.self_attn.q_proj.lora_A.weight", "missing", "target_modules"],
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    folder: Path, model: CausalLM, change: Callable[[Tensors], object], said: list[str]
) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)
    with pytest.raises(AdapterError) as raised:
        read_adapter(folder, model)
    for text in said:
        assert text in str(raised.value)


def test_modules_that_target_modules_does_not_name(folder: Path, model: CausalLM) -> None:
    change_config(folder, target_modules=["q_proj"])
    with pytest.raises(AdapterError, match=r"v_proj has A and B, but target_modules does not name it") as raised:
        read_adapter(folder, model)
    assert raised.value.parameter == "target_modules"


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"use_dora": True}, "lora_magnitude_vector' is missing"),
        ({"lora_bias": True}, "lora_B.bias' is missing"),
        ({"bias": "lora_only"}, "base_layer.bias' is missing"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight' is missing"),
        ({"trainable_token_indices": [4]}, "trainable_tokens_delta' is missing"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "k_proj.lora_A.weight' is missing"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "matches no parameter"),
        ({"r": 5}, r"expected \[5, 48\]"),
    ],
)
def test_what_the_configuration_asks_for_must_be_there(
    folder: Path, model: CausalLM, changes: dict[str, Any], said: str
) -> None:
    change_config(folder, **changes)
    with pytest.raises(AdapterError, match=said):
        read_adapter(folder, model)


def test_without_target_modules_the_tensors_say_it(folder: Path, model: CausalLM) -> None:
    expected = read_adapter(folder, model)
    change_config(folder, target_modules=None)
    assert read_adapter(folder, model).digest == expected.digest


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_another_base_is_refused(folder: Path, base_of: Callable[[str], Base]) -> None:
    with pytest.raises(AdapterError, match=r"shape|does not have"):
        read_adapter(folder, base_of("gpt2")[1])
    with pytest.raises(AdapterError, match="base model"):
        read_adapter(folder, base_of("llama-tied-heads")[1])


def test_a_rank_above_the_limit(folder: Path, model: CausalLM) -> None:
    assert read_adapter(folder, model, max_rank=4).rank == 4
    with pytest.raises(AdapterError, match="rank is 4; at most 3"):
        read_adapter(folder, model, max_rank=3)


@pytest.mark.parametrize(
    "name,content,said",
    [
        ("adapter_config.json", None, "no adapter_config.json"),
        ("adapter_config.json", b"{", "cannot be read"),
        ("adapter_config.json", b"[]", "not a JSON object"),
        ("adapter_config.json", b"\xff\xfe", "cannot be read"),
        ("adapter_config.json", b"[" * 100_000, "cannot be read"),
        (FILE, None, "no adapter_model.safetensors"),
        (FILE, b"", "damaged"),
        (FILE, b"\xff" * 64, "damaged"),
    ],
)
def test_files_that_are_missing_or_damaged(
    folder: Path, model: CausalLM, name: str, content: bytes | None, said: str
) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(AdapterError, match=said):
        read_adapter(folder, model)


def test_a_file_that_was_cut_short_at_any_length(folder: Path, model: CausalLM) -> None:
    whole = (folder / FILE).read_bytes()
    for length in random.Random(0).sample(range(len(whole)), 30):
        (folder / FILE).write_bytes(whole[:length])
        with pytest.raises(AdapterError):
            read_adapter(folder, model)


def test_a_folder_without_tensors(folder: Path, model: CausalLM) -> None:
    save_file({}, folder / FILE)
    with pytest.raises(AdapterError):
        read_adapter(folder, model)


class Command:
    """Pickled, it would run when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_read_only_by_leave_and_never_runs(folder: Path, model: CausalLM, tmp_path: Path) -> None:
    expected = read_adapter(folder, model)
    torch.save(load_file(folder / FILE), folder / "adapter_model.bin")
    (folder / FILE).unlink()
    with pytest.raises(AdapterError, match="pickle"):
        read_adapter(folder, model)
    assert read_adapter(folder, model, allow_pickle=True).digest == expected.digest
    for protocol in (2, 4):
        (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": Command(tmp_path / "ran")}, protocol))
        with pytest.raises(AdapterError, match="cannot be read as plain tensors"):
            read_adapter(folder, model, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_become_float32(folder: Path, model: CausalLM, dtype: torch.dtype) -> None:
    expected = read_adapter(folder, model)
    save_file({key: tensor.to(dtype) for key, tensor in load_file(folder / FILE).items()}, folder / FILE)
    adapter = read_adapter(folder, model)
    for name, tensor in adapter.tensors().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected.tensors()[name].to(dtype).float())


def test_a_table_beside_a_and_b_counts_only_where_it_is_not_the_bases(model: CausalLM, tmp_path: Path) -> None:
    adapter = adapter_of(model, target_modules=("embed_tokens", "lm_head"))
    write_adapter(tmp_path / "one", adapter)
    (tmp_path / "one" / "quire.json").unlink()
    tensors = load_file(tmp_path / "one" / FILE)
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"base_model.model.{name}.base_layer.weight"] = model.get_submodule(name).weight.detach().clone()
    save_file(tensors, tmp_path / "one" / FILE)
    assert read_adapter(tmp_path / "one", model).digest == adapter.digest
    tensors["base_model.model.lm_head.base_layer.weight"] += 1
    save_file(tensors, tmp_path / "one" / FILE)
    changed = read_adapter(tmp_path / "one", model)
    assert torch.equal(changed.parts["lm_head"].weight, model.lm_head.weight + 1)
    assert changed.parts["model.embed_tokens"].weight is None
    tensors["base_model.model.lm_head.base_layer.weight"] = torch.zeros(99, 48)
    save_file(tensors, tmp_path / "one" / FILE)
    with pytest.raises(AdapterError, match="Is this the adapter's base model"):
        read_adapter(tmp_path / "one", model)


def test_the_digest_is_of_the_content(model: CausalLM, tmp_path: Path) -> None:
    adapter = adapter_of(model)
    digests = {adapter.digest}
    for other in (
        adapter_of(model, seed=1),
        adapter_of(model, lora_alpha=9),
        adapter_of(model, use_dora=True),
        adapter_of(model, target_modules=("q_proj", "k_proj")),
    ):
        assert other.digest not in digests
        digests.add(other.digest)
    renamed = replace(adapter, config=replace(adapter.config, base_model_name_or_path="another"), chat_template="x")
    assert renamed.digest == adapter.digest == adapter.frozen().digest
    training = adapter.trained_further()
    assert training.digest == adapter.digest
    with torch.no_grad():
        next(iter(training.tensors().values()))[0, 0] += 1e-6
    assert training.digest != adapter.digest


def test_the_folder_carries_template_tokens_and_hashes(model: CausalLM, tmp_path: Path) -> None:
    adapter = replace(
        adapter_of(model), chat_template="{{ messages }} \u00e9", special_tokens={"eos_token": "<|im_end|>"}, base_digest="abc"
    )
    write_adapter(tmp_path / "one", adapter, base_name="some/base", extra_files={"metrics.json": "{}", "a.bin": b"\x00"})
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {
        "adapter_config.json", FILE, "README.md", "quire.json", "chat_template.jinja", "special_tokens_map.json",
        "metrics.json", "a.bin",
    }  # fmt: skip
    back = read_adapter(tmp_path / "one", model)
    assert back.chat_template == adapter.chat_template
    assert back.special_tokens == adapter.special_tokens
    assert back.base_digest == "abc"
    assert back.config.base_model_name_or_path == "some/base"
    with safe_open(tmp_path / "one" / FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(file.get_tensor(key).dtype == torch.float32 for key in file.keys())  # noqa: SIM118
    assert "base_model: \"some/base\"" in (tmp_path / "one" / "README.md").read_text()
    tensors = (tmp_path / "one" / FILE).read_bytes()
    (tmp_path / "one" / FILE).write_bytes(tensors[:-1] + bytes([tensors[-1] ^ 1]))
    with pytest.raises(AdapterError, match="damaged: its sha256"):
        read_adapter(tmp_path / "one", model)


@pytest.mark.parametrize(
    "stored,expected",
    [
        ("plain", "plain"),
        ([{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        (None, None),
        (7, None),
    ],
)
def test_a_template_in_the_tokenizers_configuration(
    folder: Path, model: CausalLM, stored: object, expected: str | None
) -> None:
    tokens = {"chat_template": stored, "eos_token": {"content": "</s>"}, "pad_token": "<pad>", "unk_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    adapter = read_adapter(folder, model)
    assert adapter.chat_template == expected
    assert adapter.special_tokens == {"eos_token": "</s>", "pad_token": "<pad>"}


def test_the_same_adapter_is_the_same_bytes(model: CausalLM, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_adapter(tmp_path / name, adapter_of(model, target_modules="all-linear"), base_name="b")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_folder_is_there_whole_whenever_the_writer_is_killed(model: CausalLM, tmp_path: Path) -> None:
    adapters = [adapter_of(model, seed) for seed in (1, 2)]
    write_adapter(tmp_path / "adapter", adapters[0])
    pauses = random.Random(0)
    for _ in range(8):
        child = os.fork()
        if not child:
            while True:
                for adapter in adapters:
                    write_adapter(tmp_path / "adapter", adapter)
        time.sleep(0.02 + pauses.random() / 10)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert read_adapter(tmp_path / "adapter", model).digest in {adapter.digest for adapter in adapters}
    left = [path.name for path in tmp_path.iterdir() if path.name != "adapter"]
    assert all(name.startswith(".adapter.") for name in left)  # what a watcher of folders passes over
