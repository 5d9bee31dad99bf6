"""What `quire adapters check` says of each kind of adapter, beside what PEFT really does with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire.cli.main import run
from quire.lora.adapter import write_adapter
from quire.lora.check import Verdict, check_adapter
from quire.lora.config import LoraConfig
from quire.lora.new import new_adapter
from quire.models.config import read_model_config
from tests.lora.cases import BY_NAME, CASES, loaded_by_peft, made_by_peft
from tests.lora.conftest import Base

pytestmark = pytest.mark.filterwarnings("ignore")
# Of the cases, those that vLLM takes (its own parser was run on such files), and what it says of the others.
VLLM = {
    "bias-lora": "bias is 'lora_only'",
    **{f"bias-all{base}": "bias is 'all'" for base in ("", "-gpt2", "-opt", "-opt-350m", "-saved")},
    "bias-gpt2": "bias is 'lora_only'",
    "lora-bias": "lora_bias",
    **{name: "DoRA" for name in ("dora", "dora-biases", "dora-gpt2", "dora-embedding")},
    **{name: "modules_to_save" for name in ("saved-head", "saved-both", "saved-linear", "saved-gpt2", "saved-container")},
    **{name: "modules_to_save" for name in ("saved-tied", "saved-tied-head", "saved-tied-both")},
    **{f"saved-norms{base}": "modules_to_save" for base in ("", "-layers", "-gpt2", "-opt", "-gemma3", "-mixtral")},
    "saved-layer-gpt2": "modules_to_save",
    "everything": "bias is 'all'",
    **{name: "trainable_tokens_delta" for name in ("tokens", "tokens-tied", "tokens-tied-both", "tokens-head")},
}


def verdicts(folder: Path, base: Path | None = None) -> dict[str, Verdict]:
    found = check_adapter(folder, None if base is None else read_model_config(base))
    assert [verdict.reader for verdict in found] == ["Quire", "PEFT", "vLLM"]
    return {verdict.reader: verdict for verdict in found}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_peft_saved(case: Any, base_of: Callable[[str], Base], tmp_path: Path) -> None:
    folder, _ = base_of(case.base)
    made_by_peft(case, folder).save_pretrained(tmp_path)
    for base in (None, folder):
        said = verdicts(tmp_path, base)
        assert said["Quire"].accepts
        assert said["PEFT"].accepts
        assert said["vLLM"].accepts == (case.name not in VLLM)
        assert VLLM.get(case.name, "") in " ".join(said["vLLM"].reasons)


@pytest.fixture
def plain(base_of: Callable[[str], Base], tmp_path: Path) -> tuple[Path, Path]:
    """(base, folder) of a plain adapter."""
    base, _ = base_of("qwen3")
    made_by_peft(BY_NAME["plain"], base).save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter"


@pytest.mark.parametrize(
    "changes,quire,peft,vllm",
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights", None, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights", None, "init_lora_weights"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens", None, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication", "-", "layer_replication"),
        ({"use_qalora": True}, "use_qalora", "-", "use_qalora"),
        ({"layers_pattern": "layers"}, "layers_pattern", "layers_pattern", None),
        ({"use_dora": True, "lora_bias": True}, "lora_bias", "lora_bias", "DoRA"),
        ({"target_modules": "q_proj|v_proj", "layers_to_transform": [1]}, "layers_to_transform", "layers_to_transform", None),
        ({"rank_pattern": {"q_proj": 600}}, "expected [600", "-", "rank 600 is above 512"),
        ({"r": 64}, "expected [64", "-", None),
    ],
)
def test_what_is_refused_and_by_whom(
    plain: tuple[Path, Path], changes: dict[str, Any], quire: str, peft: str | None, vllm: str | None
) -> None:
    """peft "-": not asked, because it depends on the tensors."""
    base, folder = plain
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    said = verdicts(folder, base)
    for reader, reason in (("Quire", quire), ("PEFT", peft), ("vLLM", vllm)):
        if reason != "-":
            assert said[reader].accepts == (reason is None), reader
            assert (reason or "") in " ".join(said[reader].reasons)
    if peft != "-":
        try:
            loaded_by_peft(base, folder)
            loads = True
        except ValueError:
            loads = False
        assert said["PEFT"].accepts == loads


def test_ranks_that_vllm_takes_with_a_flag(base_of: Callable[[str], Base], tmp_path: Path) -> None:
    base, _ = base_of("qwen3")
    case = BY_NAME["plain"]
    made_by_peft(type(case)("", "qwen3", case.options | {"r": 20}), base).save_pretrained(tmp_path)
    assert "needs --max-lora-rank 32." in verdicts(tmp_path, base)["vLLM"].notes


def test_what_peft_passes_over_in_models_that_have_experts_in_some_layers(
    base_of: Callable[[str], Base], tmp_path: Path
) -> None:
    base, model = base_of("qwen3_moe-mixed")
    adapter = new_adapter(model, LoraConfig(), 0)
    assert "model.layers.0.mlp.gate_proj" in adapter.parts
    assert "model.layers.1.mlp.experts.0.gate_proj" in adapter.parts
    write_adapter(tmp_path / "adapter", adapter)
    said = verdicts(tmp_path / "adapter", base)
    assert said["Quire"].accepts
    assert "passes over" in said["PEFT"].notes[0]
    loaded = {name for name, _ in loaded_by_peft(base, tmp_path / "adapter").named_parameters() if "lora_" in name}
    assert not any("layers.0.mlp" in name for name in loaded)


def test_damage_is_seen_without_the_base_and_foreign_names_with_it(plain: tuple[Path, Path]) -> None:
    base, folder = plain
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(iter(tensors))
    save_file(tensors | {key: torch.full_like(tensors[key], torch.nan)}, file)
    assert "not finite" in verdicts(folder)["Quire"].reasons[0]
    save_file({key.replace("q_proj", "query"): tensor for key, tensor in tensors.items()}, file)
    assert verdicts(folder)["Quire"].accepts
    assert "query" in verdicts(folder, base)["Quire"].reasons[0]
    assert "passes over" in verdicts(folder, base)["PEFT"].notes[0]
    file.write_bytes(file.read_bytes()[:100])
    assert not any(verdict.accepts for verdict in verdicts(folder).values())
    (folder / "adapter_config.json").write_text("[]")
    assert not any(verdict.accepts for verdict in verdicts(folder).values())


def test_the_command(plain: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    base, folder = plain
    assert run(["adapters", "check", str(folder), "--model", str(base)]) == 0
    out = capsys.readouterr().out
    assert "Quire  accepts it" in out
    assert "vLLM   accepts it" in out
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    assert run(["adapters", "check", str(folder), "--model", str(base), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert [one["accepts"] for one in told] == [False, True, False]
    assert "lora_magnitude_vector" in told[0]["reasons"][0]
    assert run(["adapters", "check", str(folder / "nowhere")]) == 2
