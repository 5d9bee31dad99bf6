"""Loading: every layout that repositories hold, and one clear error for each way a folder can be damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire.assemble import assemble
from quire.batch import packed
from quire.errors import ModelError
from quire.models.config import read_model_config
from quire.weights.files import checkpoint_files, tensor_headers, weight_bytes
from quire.weights.hub import resolve

TOKENS = [5, 9, 200, 31, 7]


def logits(folder: Path) -> torch.Tensor:
    model = assemble(folder, read_model_config(folder), "float32")
    return model.logits(model(packed([TOKENS])))


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    weights = load_file(folder / "model.safetensors")
    for name, value in change.items():
        weights.pop(name, None)
        if value is not None:
            weights[name] = value
    save_file(weights, folder / "model.safetensors")


def shard(folder: Path, suffix: str) -> None:
    """Split the weights over two files with an index, as large repositories do."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    names = sorted(weights)
    places = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-{number:05}-of-00002.{suffix}"
        tensors = {name: weights[name] for name in part}
        save_file(tensors, folder / file) if suffix == "safetensors" else torch.save(tensors, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_sharded_checkpoints_load(folder: Path, suffix: str) -> None:
    expected, size = logits(folder), weight_bytes(folder, "float32")
    shard(folder, suffix)
    assert len(checkpoint_files(folder)) == 2
    assert torch.equal(logits(folder), expected)
    assert weight_bytes(folder, "float32") == size


def test_a_single_bin_loads_in_both_of_pytorchs_formats(folder: Path) -> None:
    expected, weights = logits(folder), load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for zipped in (True, False):
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        assert torch.equal(logits(folder), expected)


def test_headers_agree_with_the_tensors(folder: Path) -> None:
    headers = tensor_headers(folder / "model.safetensors")
    weights = load_file(folder / "model.safetensors")
    assert {name: header.shape for name, header in headers.items()} == {name: tuple(w.shape) for name, w in weights.items()}
    assert weight_bytes(folder, "bfloat16") == sum(w.numel() for w in weights.values()) * 2


class Malicious:
    def __reduce__(self) -> tuple:
        return (open, ("stolen", "w"))


def test_a_bin_that_holds_code_is_refused_and_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Malicious()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin cannot be read as plain tensors"):
        logits(folder)
    assert not (folder / "stolen").exists()


def test_missing_and_unknown_tensors_are_named(folder: Path) -> None:
    rewrite(folder, {"model.norm.weight": None, "model.extra.weight": torch.ones(3)})
    with pytest.raises(ModelError, match=r"missing: model\.norm\.weight; unknown: model\.extra\.weight"):
        logits(folder)


def test_a_wrong_shape_is_named(folder: Path) -> None:
    rewrite(folder, {"model.norm.weight": torch.ones(63)})
    with pytest.raises(ModelError, match=r"'model\.norm\.weight' of model\.safetensors has shape \[63\].*\[64\]"):
        logits(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]), "should have"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "header is longer than the file"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights in"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "must be a JSON object"),
        (lambda f: (f / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}'), "has no field"),
        (lambda f: (f / "config.json").write_text("{}"), "names no architecture"),
        (lambda f: (f / "config.json").unlink(), "not a model folder"),
    ],
)
def test_a_damaged_folder_is_one_clear_error(folder: Path, damage: object, message: str) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=message) as caught:
        logits(folder)
    assert "\n" not in str(caught.value)


def test_an_index_cannot_point_outside(folder: Path) -> None:
    shard(folder, "safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(ModelError, match="outside its folder"):
        checkpoint_files(folder)
    index.write_text(json.dumps({"weight_map": {"a": "model-00009-of-00009.safetensors"}}))
    with pytest.raises(ModelError, match="1 of 1 weight files are missing"):
        checkpoint_files(folder)


def test_an_unknown_architecture_suggests_the_nearest(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LamaForCausalLM"]}))
    with pytest.raises(ModelError, match='Did you mean "LlamaForCausalLM"'):
        logits(folder)


def test_hub_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE is set.*quire-tiny"):
        resolve("owner/some-model-that-is-nowhere")
    with pytest.raises(ModelError, match="neither a folder nor a hub id"):
        resolve("/no/such/folder")
    assert (resolve("quire-tiny") / "config.json").is_file()
