"""plan, presets, models and doctor: what they print, for people and as JSON."""

from __future__ import annotations

import builtins
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from quire import presets
from quire.cli.plan import estimated_parameters, stored_weights
from quire.models.config import read_model_config
from tests.cli.running import Quire


def test_plan_of_a_folder(quire: Quire, tiny_llama: Path) -> None:
    ran = quire("plan", str(tiny_llama), "--memory", "2G", "--cores", "3")
    assert ran.code == 0
    assert "fits 3 cores with 2.0 GiB of free memory" in ran.out
    assert "Maximum concurrency for 512 tokens per request" in ran.out


def test_plan_as_json_is_the_engines_plan(quire: Quire, tiny_llama: Path) -> None:
    from quire.config import EngineConfig
    from quire.plan.hardware import Hardware
    from quire.plan.memory import make_plan

    facts = json.loads(quire("plan", str(tiny_llama), "--memory", "2G", "--cores", "3", "--max-num-seqs", "7", "--json").out)
    model = read_model_config(tiny_llama)
    weights, _ = stored_weights(tiny_llama, model)
    made = make_plan(EngineConfig(str(tiny_llama), max_num_seqs=7), model, weights, Hardware(3, 2 << 30, 2 << 30))
    assert facts["fits"] is True
    assert {key: facts[key] for key in made.as_dict()} == json.loads(json.dumps(made.as_dict()))


def test_plan_that_does_not_fit(quire: Quire, tiny_llama: Path) -> None:
    ran = quire("plan", str(tiny_llama), "--memory", "100M")
    assert (ran.code, ran.out) == (4, "")
    assert "does not fit" in ran.err
    ran = quire("plan", str(tiny_llama), "--memory", "100M", "--json")
    facts = json.loads(ran.out)
    assert (ran.code, facts["fits"]) == (4, False)
    again = quire("plan", str(tiny_llama), "--memory", str(facts["exits"][-1]["memory_free"]))
    assert again.code == 0


def test_every_printed_command_fits_as_it_stands(quire: Quire, tiny_llama: Path) -> None:
    words = ["plan", str(tiny_llama), "--memory", "226M", "--max-num-batched-tokens", "2048", "--max-num-seqs", "256"]
    facts = json.loads(quire(*words, "--json").out)
    commands = [way["command"] for way in facts["exits"] if way["command"].startswith("--")]
    assert commands
    for command in commands:
        assert quire(*words, *command.split()).code == 0, command


def test_weights_that_are_not_here_are_estimated(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())
    model = read_model_config(tmp_path)
    exact, source = stored_weights(tiny_llama, model)
    assert source == "the files' headers"
    estimate, source = stored_weights(tmp_path, model)
    assert "not on this machine" in source
    assert estimate.as_stored.bytes_as(4) == estimated_parameters(model) * 4
    for sizes, about in ((exact.as_stored, estimate.as_stored), (exact.at_load["int8"], estimate.at_load["int8"])):
        assert abs(about.bytes_as(4) - sizes.bytes_as(4)) < 0.05 * sizes.bytes_as(4)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1234}, "weight_map": {"x": "model-1.safetensors"}})
    )
    assert stored_weights(tmp_path, model)[0].as_stored.bytes_as(4) == 1232


def test_presets_table(quire: Quire) -> None:
    ran = quire("presets")
    assert all(row.name in ran.out and row.title in ran.out for row in presets.PRESETS)
    assert json.loads(quire("presets", "--json").out) == [row.as_dict() for row in presets.PRESETS]


@pytest.mark.parametrize("name", presets.names())
def test_presets_show(quire: Quire, name: str) -> None:
    row = presets.find(name)
    ran = quire("presets", "show", name)
    assert row.reason in ran.out
    assert json.loads(quire("presets", "show", name, "--json").out) == row.as_dict()


def test_presets_show_unknown(quire: Quire) -> None:
    ran = quire("presets", "show", "creativ")
    assert (ran.code, 'Did you mean "creative"?' in ran.err) == (6, True)
    assert 'Did you mean "show chat"?' in quire("presets", "chat").err


def test_explain_names_every_source(quire: Quire, tiny_llama: Path, tmp_path: Path) -> None:
    for path in tiny_llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": 20, "temperature": 0.9, "top_p": 0.8}))
    words = ["presets", "explain", "--model", str(tmp_path), "--preset", "chat", "--min-p", "0.1", "--max-num-seqs", "4"]
    words += ["--override-generation-config", '{"frequency_penalty": 0.5}']
    facts = json.loads(quire(*words, "--json").out)
    sampling = {name: (row["value"], row["source"]) for name, row in facts["sampling"].items()}
    assert sampling["min_p"] == (0.1, "request")
    assert sampling["frequency_penalty"] == (0.5, "flag")
    assert sampling["temperature"] == (0.7, "preset")
    assert sampling["top_k"] == (20, "generation_config")
    assert sampling["presence_penalty"] == (0.0, "default")
    assert facts["sampling"]["top_p"]["beaten"] == {"generation_config": 0.8, "default": 1.0}
    assert facts["engine"]["max_num_seqs"] == {"value": 4, "source": "flag"}
    assert facts["engine"]["max_model_len"] == {"value": 512, "source": "model, preset 4096"}
    text = quire(*words).out
    assert "preset chat  (instead of generation_config 0.9, default 1.0)" in text


def test_explain_notes_what_left_the_range(quire: Quire, tiny_llama: Path) -> None:
    ran = quire("presets", "explain", "--model", str(tiny_llama), "--preset", "code", "--temperature", "0.9")
    assert "note: temperature=0.9 is outside the range 0 to 0.2 of preset code" in ran.out


def test_models(quire: Quire, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"architectures": ["Strange"]}')
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    facts = json.loads(quire("models", str(tiny_llama.parent), "--json").out)
    found = {Path(model["name"]).name: model for model in facts["models"]}
    assert found["tiny-llama"]["architecture"] == "LlamaForCausalLM"
    assert found["tiny-llama"]["problem"] is None
    assert found["model"]["problem"]
    assert found["quire-tiny"]["where"] == "in the package"
    assert "LlamaForCausalLM" in facts["families"]["llama"]
    assert "tiny-llama" in quire("models", str(tiny_llama.parent)).out


def findings(quire: Quire, *words: str) -> dict[str, dict[str, Any]]:
    return {f["name"]: f for f in json.loads(quire("doctor", "--json", *words).out)["findings"]}


def test_doctor_reports_and_finds_what_is_wrong(quire: Quire, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from quire.plan.hardware import Hardware

    monkeypatch.setattr("quire.cli.doctor.probe", lambda: Hardware(2, 1 << 30, 100 << 20))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = findings(quire, "--no-torch", "--port", str(port))
    assert found["memory"]["severity"] == "warning"
    assert found["instruction sets"]["severity"] == "warning"
    assert found[str(port)]["severity"] == "warning"
    assert f"--port {port + 1}" in found[str(port)]["fix"]
    assert "offline" in found["mode"]["value"]
    assert all(f["fix"] for f in found.values() if f["problem"])


def test_doctor_survives_without_torch(quire: Quire, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_torch(name: str, *rest: Any) -> Any:
        if name == "torch":
            raise ImportError("no torch here")
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    ran = quire("doctor")
    assert ran.code == 1
    assert "torch cannot be imported: no torch here" in ran.out


def test_doctor_survives_a_check_that_fails(quire: Quire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: 1 / 0)
    assert "a check failed: division by zero" in quire("doctor", "--no-torch").out


def test_doctor_shows_no_home(quire: Quire) -> None:
    assert str(Path.home()) + "/" not in quire("doctor", "--no-torch").out


def test_doctor_with_torch(quire: Quire) -> None:
    found = findings(quire)
    assert found["bfloat16 product"]["value"] == "right"
    assert "GB/s" in found["memory bandwidth"]["value"]
