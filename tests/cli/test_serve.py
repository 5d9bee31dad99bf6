"""Flags become the engine's and the server's options, exactly."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from quire.cli.flags import field_docs, human_integer
from quire.cli.serve import command
from quire.config import EngineConfig
from quire.server.options import ServerOptions
from tests.cli.running import Quire


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[EngineConfig, ServerOptions]]:
    calls: list[tuple[EngineConfig, ServerOptions]] = []
    monkeypatch.setattr("quire.server.app.serve", lambda config, options: calls.append((config, options)))
    monkeypatch.delenv("QUIRE_API_KEY", raising=False)
    return calls


def test_bare_serve_is_quire_tiny_with_every_default(quire: Quire, served: list) -> None:
    assert quire("serve").code == 0
    assert served == [(EngineConfig("quire-tiny"), ServerOptions())]


def test_every_field_is_a_flag_with_help() -> None:
    flags = {p.name: p for p in command.params}
    for kind in (EngineConfig, ServerOptions):
        for f in fields(kind):
            assert f.name in flags
            if f.name != "model":
                assert flags[f.name].help, f.name  # type: ignore[attr-defined]
        assert set(field_docs(kind)) == {f.name for f in fields(kind)}


VALUES: dict[str, tuple[str, Any]] = {
    "str": ("text", "text"),
    "int": ("2k", 2000),
    "int | None": ("7", 7),
    "float": ("0.5", 0.5),
    "float | None": ("0.5", 0.5),
    "str | None": ("text", "text"),
    "int | str | None": ("1K", 1024),
    "Mapping[str, Any] | None": (
        '{"method": "ngram", "num_speculative_tokens": 2}',
        {"method": "ngram", "num_speculative_tokens": 2},
    ),
    "Mapping[str, Any]": ('{"temperature": 0.5}', {"temperature": 0.5}),
    "tuple[str, ...]": ("one", ("one",)),
}
SPECIAL = {
    "dtype": "bfloat16",
    "block_size": 32,
    "scheduling_policy": "priority",
    "generation_config": "vllm",
    "preset": "chat",
    "unknown_fields": "warn",
    "root_path": "/x",
    "max_model_len": 64,
    "num_gpu_blocks_override": 64,
    "kv_cache_memory_bytes": 1 << 20,
    "kv_cache_dtype": "fp8_e5m2",
    "max_lora_rank": 32,
    "lora_dtype": "float32",
    "lora_modules": ("a=b",),
}
# What a flag needs beside it.
ALSO = {
    "host": ["--insecure"],
    "calculate_kv_scales": ["--kv-cache-dtype", "fp8"],
    **{
        name: ["--enable-lora"]
        for name in (
            "max_loras",
            "max_lora_rank",
            "max_cpu_loras",
            "training_jobs",
            "lora_dtype",
            "lora_modules",
            "lora_dir",
            "allowed_lora_path",
        )
    },
}
# Options whose value must exist on the machine or is refused today.
SKIPPED = {"model", "ssl_keyfile", "ssl_certfile", "tensor_parallel_size", "pipeline_parallel_size", "quantization"}


@pytest.mark.parametrize(
    "kind, field",
    [(kind, f) for kind in (EngineConfig, ServerOptions) for f in fields(kind) if f.name not in SKIPPED],
    ids=lambda value: getattr(value, "name", value.__name__ if isinstance(value, type) else ""),
)
def test_each_flag_reaches_its_field(quire: Quire, served: list, tiny_llama: Path, kind: type, field: Any) -> None:
    flag = "--" + field.name.replace("_", "-")
    if field.type == "bool":
        words, expected = ([flag], True) if not field.default else (["--no-" + flag[2:]], False)
    else:
        text, expected = VALUES[field.type]
        if field.name in SPECIAL:
            expected = SPECIAL[field.name]
            text = expected[0] if isinstance(expected, tuple) else str(expected)
        words = [flag, text]
    ran = quire("serve", str(tiny_llama), *words, *ALSO.get(field.name, []))
    assert ran.code == 0, ran.err
    made = served[0][0] if kind is EngineConfig else served[0][1]
    assert getattr(made, field.name) == expected
    default = field.default if field.default is not MISSING else field.default_factory()
    assert expected != default


def test_fine_tuning_serves_adapters(quire: Quire, served: list, tiny_llama: Path, tmp_path: Path) -> None:
    assert quire("serve", str(tiny_llama), "--data-dir", str(tmp_path)).code == 0
    config, options = served[-1]
    assert config.enable_lora
    assert config.max_loras == 2
    assert config.gpu_memory_utilization == 0.6
    assert options.data_folder == tmp_path
    assert quire("serve", str(tiny_llama), "--enable-fine-tuning", "--max-loras", "8").code == 0
    assert (served[-1][0].max_loras, served[-1][0].max_cpu_loras) == (8, 8)
    refused = quire("serve", str(tiny_llama), "--enable-fine-tuning", "--no-enable-lora")
    assert refused.code != 0
    assert "--no-enable-lora" in refused.err
    assert quire("serve", str(tiny_llama)).code == 0
    assert served[-1][1].data_folder is None, "nothing is kept unless it is asked for"


@pytest.mark.parametrize(
    "text, number",
    [
        ("4096", 4096),
        ("1k", 1000),
        ("1K", 1024),
        ("2M", 2 << 20),
        ("25.6k", 25600),
        ("1g", 10**9),
        ("4GiB", 4 << 30),
        ("-1", -1),
    ],
)
def test_numbers_for_people(text: str, number: int) -> None:
    assert human_integer(text) == number


@pytest.mark.parametrize("text", ["", "k", "1x", "1.5.2", "0x10", "1 000"])
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(ValueError):
        human_integer(text)


@pytest.mark.parametrize("text, value", [("auto", "auto"), ("-1", -1), ("1k", 1000)])
def test_max_model_len(quire: Quire, served: list, tiny_llama: Path, text: str, value: Any) -> None:
    ran = quire("serve", str(tiny_llama), "--max-model-len", text)
    if value == 1000:  # the tiny model has 512
        assert ran.code == 3
    else:
        assert served[0][0].max_model_len == value


def test_wrong_number_is_one_line(quire: Quire) -> None:
    ran = quire("serve", "--max-model-len", "many")
    assert ran.code == 2
    assert "must be a whole number such as 4096, 4k (4000) or 4K (4096) or auto, got 'many'" in ran.err


def test_several_names_and_keys_as_vllm_takes_them(quire: Quire, served: list, tiny_llama: Path) -> None:
    words = ["--served-model-name", "a", "b", "--api-key", "k1", "k2", "--port", "9", "--allowed-origins", '["x", "y"]']
    assert quire("serve", str(tiny_llama), *words).code == 0
    options = served[0][1]
    assert (options.served_model_name, options.api_key, options.port) == (("a", "b"), ("k1", "k2"), 9)
    assert options.allowed_origins == ("x", "y")


def test_key_from_the_environment(quire: Quire, served: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_API_KEY", "secret")
    assert quire("serve", "--host", "0.0.0.0").code == 0
    assert quire("serve", "--api-key", "other").code == 0
    assert [options.api_key for _, options in served] == [("secret",), ("other",)]


def test_public_address_without_a_key_is_refused(quire: Quire, served: list) -> None:
    ran = quire("serve", "--host", "0.0.0.0")
    assert (ran.code, served) == (3, [])
    assert "without a key" in ran.err


@pytest.mark.parametrize(
    "words, code",
    [
        (["--enable-chunked-prefill"], 0),
        (["--enforce-eager"], 0),
        (["--no-trust-remote-code"], 0),
        (["--no-enable-chunked-prefill"], 3),
        (["--trust-remote-code"], 3),
    ],
)
def test_what_is_a_fact_here_cannot_be_changed(quire: Quire, served: list, words: list[str], code: int) -> None:
    assert quire("serve", *words).code == code


def test_wrong_value_names_the_flag(quire: Quire, served: list) -> None:
    ran = quire("serve", "--gpu-memory-utilization", "1.5")
    assert (ran.code, ran.err) == (3, "error: --gpu-memory-utilization must be in (0, 1], got 1.5.\n")


def test_model_named_twice(quire: Quire, served: list, tiny_llama: Path) -> None:
    assert quire("serve", str(tiny_llama), "--model", "quire-tiny").code == 3
    assert quire("serve", "--model", str(tiny_llama)).code == 0


def test_what_does_not_fit_is_refused_before_the_server_starts(
    quire: Quire, served: list, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quire.plan.hardware import Hardware

    monkeypatch.setattr("quire.cli.plan.probe", lambda: Hardware(2, 1 << 30, 64 << 20))
    ran = quire("serve", str(tiny_llama))
    assert (ran.code, served) == (4, [])
    assert "does not fit" in ran.err
    assert "  1  " in ran.err
