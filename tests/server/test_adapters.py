"""Adapters over HTTP: named as `model`, listed, loaded, uploaded, followed on the disk, and taken away; bad ones refused."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from safetensors.torch import load_file, save_file

from quire import LLM, LoRARequest, SamplingParams
from quire.config import EngineConfig
from quire.engine.async_engine import AsyncEngine
from quire.errors import ConfigError
from quire.server.options import ServerOptions
from quire.service.adapters import Module
from tests.conftest import TEMPLATE
from tests.lora.making import LINEAR, save_adapter
from tests.server.running import RunningServer, at_rest, slow_steps, wait_for

OWN_TEMPLATE = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def lora_engine(tiny_llama: Path) -> Iterator[AsyncEngine]:
    config = EngineConfig(
        model=str(tiny_llama),
        dtype="float32",
        max_num_seqs=8,
        max_num_batched_tokens=64,
        num_gpu_blocks_override=96,
        enable_lora=True,
        max_loras=2,
        max_cpu_loras=4,
    )
    made = AsyncEngine.from_config(config)
    yield made
    made.shutdown()


@pytest.fixture
def house(lora_engine: AsyncEngine, tiny_llama: Path, tmp_path: Path) -> Iterator[RunningServer]:
    """A server with one adapter given at start and one in its directory."""
    store = tmp_path / "store"
    save_adapter(tmp_path / "given", tiny_llama, 1)
    save_adapter(store / "found", tiny_llama, 2, r=8, targets=LINEAR)
    with RunningServer(
        lora_engine, served_model_name=("tiny",), lora_modules=(f"given={tmp_path / 'given'}",), lora_dir=str(store)
    ) as server:
        yield server
    server.application.adapters.close()
    for name in lora_engine.adapters.names():
        lora_engine.adapters.remove(name)


@pytest.fixture
def http(house: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=house.url, timeout=60) as made:
        yield made


def text_of(http: httpx.Client, model: str, **more: Any) -> str:
    asked = {"model": model, "prompt": "the quick", "max_tokens": 8, "temperature": 0, **more}
    answer = http.post("/v1/completions", json=asked)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    return answer.json()["choices"][0]["text"]


def form(folder: Path) -> list[tuple[str, tuple[str, bytes]]]:
    return [("file", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


def test_an_adapters_name_is_a_model(house: RunningServer, tiny_llama: Path, tmp_path: Path) -> None:
    client = openai.OpenAI(base_url=f"{house.url}/v1", api_key="-")
    cards = {card.id: card for card in client.models.list()}
    assert list(cards) == ["tiny", "given", "found"]
    assert (cards["given"].root, cards["given"].parent) == ("given", "tiny")  # type: ignore[attr-defined]
    assert client.models.retrieve("found").parent == "tiny"  # type: ignore[attr-defined]
    llm = LLM(str(tiny_llama), enable_lora=True, max_loras=2)
    params = SamplingParams(temperature=0, max_tokens=8)
    texts = set()
    for name, folder in (("tiny", None), ("given", tmp_path / "given"), ("found", tmp_path / "store" / "found")):
        adapter = LoRARequest(name, 1, str(folder)) if folder else None
        (expected,) = llm.generate("the quick", params, lora_request=adapter, use_tqdm=False)
        made = client.completions.create(model=name, prompt="the quick", max_tokens=8, temperature=0)
        assert (made.model, made.choices[0].text) == (name, expected.outputs[0].text)
        stream = client.completions.create(model=name, prompt="the quick", max_tokens=8, temperature=0, stream=True)
        assert "".join(piece.choices[0].text for piece in stream) == expected.outputs[0].text
        chat = client.chat.completions.create(model=name, messages=[{"role": "user", "content": "hi"}], max_tokens=4, n=2)
        assert (chat.model, len(chat.choices)) == (name, 2)
        texts.add(made.choices[0].text)
    assert len(texts) == 3
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="fuond", prompt="a")


def test_load_and_unload_as_at_vllm(http: httpx.Client, tmp_path: Path, tiny_llama: Path) -> None:
    save_adapter(tmp_path / "store" / "deep" / "er", tiny_llama, 3)
    asked = {"lora_name": "late", "lora_path": "deep/er"}
    answer = http.post("/v1/load_lora_adapter", json=asked)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'late' added successfully.")
    before = text_of(http, "late")
    error = error_of(http.post("/v1/load_lora_adapter", json=asked), 400)
    assert error["type"] == "InvalidUserInput"
    assert "has already been loaded. If you want to load the adapter in place, set 'load_inplace' to True." in error["message"]
    save_adapter(tmp_path / "store" / "deep" / "er", tiny_llama, 4)
    again = {**asked, "lora_path": str(tmp_path / "store" / "deep" / "er"), "load_inplace": True}
    answer = http.post("/v1/load_lora_adapter", json=again)
    assert answer.status_code == 200
    assert text_of(http, "late") != before
    answer = http.post("/v1/unload_lora_adapter", json={"lora_name": "late"})
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'late' removed successfully.")
    assert "cannot be found" in error_of(http.post("/v1/unload_lora_adapter", json={"lora_name": "late"}), 404)["message"]
    error_of(http.post("/v1/completions", json={"model": "late", "prompt": "a"}), 404)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"lora_name": "x"}, 400, "Both 'lora_name' and 'lora_path' must be provided."),
        ({"lora_name": "x", "lora_path": "nowhere"}, 404, "Loading lora x failed: No adapter found for nowhere"),
        ({"lora_name": "tiny", "lora_path": "found"}, 400, "the name of the base model"),
        ({"lora_name": "x", "lora_path": "../given"}, 400, "must lie below --lora-dir"),
        ({"lora_name": "x", "lora_path": "/etc"}, 400, "must lie below --lora-dir"),
        ({"lora_name": "x", "lora_path": "."}, 400, "must lie below --lora-dir"),
        ({"lora_name": "x", "lora_path": "found/\x00"}, 400, "must lie below --lora-dir"),
        ({"lora_name": "x\n", "lora_path": "found"}, 400, "printable"),
        ({"lora_name": "x", "lora_path": "found", "load_in_place": True}, 400, "load_inplace"),
    ],
)
def test_bad_loads(http: httpx.Client, body: dict[str, Any], status: int, words: str) -> None:
    assert words in error_of(http.post("/v1/load_lora_adapter", json=body), status)["message"]


def test_a_link_out_of_the_directory_is_not_followed(http: httpx.Client, tmp_path: Path) -> None:
    (tmp_path / "store" / "found" / "link").symlink_to(tmp_path / "given")
    body = {"lora_name": "x", "lora_path": "found/link"}
    assert "must lie below" in error_of(http.post("/v1/load_lora_adapter", json=body), 400)["message"]


def test_the_operator_may_allow_other_paths(
    lora_engine: AsyncEngine, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(tmp_path / "shared" / "one", tiny_llama, 5)
    save_adapter(tmp_path / "anywhere", tiny_llama, 6)
    with RunningServer(lora_engine, allowed_lora_path=(str(tmp_path / "shared"),)) as server:
        for path, status in ((tmp_path / "shared" / "one", 200), (tmp_path / "anywhere", 400)):
            body = {"lora_name": path.name, "lora_path": str(path)}
            assert httpx.post(f"{server.url}/v1/load_lora_adapter", json=body).status_code == status
        put = httpx.put(f"{server.url}/v1/adapters/new", files=form(tmp_path / "anywhere"))
        assert "--lora-dir" in error_of(put, 403)["message"]
        assert httpx.post(f"{server.url}/v1/unload_lora_adapter", json={"lora_name": "one"}).status_code == 200
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    with RunningServer(lora_engine) as server:
        body = {"lora_name": "anywhere", "lora_path": str(tmp_path / "anywhere")}
        assert httpx.post(f"{server.url}/v1/load_lora_adapter", json=body).status_code == 200
        assert httpx.post(f"{server.url}/v1/unload_lora_adapter", json={"lora_name": "anywhere"}).status_code == 200


def test_upload_replace_delete(http: httpx.Client, house: RunningServer, tmp_path: Path, tiny_llama: Path) -> None:
    first, second = (save_adapter(tmp_path / f"new{seed}", tiny_llama, seed) for seed in (7, 8))
    answer = http.put("/v1/adapters/mine", files=form(first))
    assert answer.status_code == 201, answer.text
    assert {**answer.json(), "created": 0, "digest": "", "in_memory": True} == {
        "id": "mine", "object": "adapter", "created": 0, "parent": "tiny", "root": "mine", "rank": 4, "digest": "",
        "bytes": answer.json()["bytes"], "in_memory": True, "own_chat_template": False,
    }  # fmt: skip
    stored = tmp_path / "store" / "mine"
    assert {path.name for path in stored.iterdir()} == {path.name for path in first.iterdir()}
    assert (stored / TENSORS).read_bytes() == (first / TENSORS).read_bytes()
    before = text_of(http, "mine")
    # By the fields' names instead of file names, as curl -F adapter_config.json=@... sends them.
    fields = {path.name: ("blob", path.read_bytes()) for path in second.iterdir()}
    answer = http.put("/v1/adapters/mine", files=fields)
    assert answer.status_code == 200, answer.text
    assert text_of(http, "mine") != before
    assert (stored / TENSORS).read_bytes() == (second / TENSORS).read_bytes()
    house.application.adapters.look()
    assert http.get("/v1/adapters/mine").json()["digest"] == answer.json()["digest"]
    assert [card["id"] for card in http.get("/v1/adapters").json()["data"]] == ["given", "found", "mine"]
    assert http.delete("/v1/adapters/mine").json() == {"id": "mine", "object": "adapter", "deleted": True}
    assert not stored.exists()
    error_of(http.delete("/v1/adapters/mine"), 404)
    # One given at start is forgotten, but its files are the operator's.
    assert http.delete("/v1/adapters/given").status_code == 200
    assert (tmp_path / "given" / CONFIG).is_file()
    assert not [path for path in (tmp_path / "store").iterdir() if path.name.startswith(".")]


def spoiled(kind: str, folder: Path) -> tuple[str, str]:
    """Spoil a good adapter's folder; returns (a word of the message, the field that is named)."""
    if kind == "damaged":
        raw = bytearray((folder / TENSORS).read_bytes())
        raw[-1] ^= 1
        (folder / TENSORS).write_bytes(raw)
        return "damaged", ""
    if kind == "base":
        notes = json.loads((folder / "quire.json").read_text())
        (folder / "quire.json").write_text(json.dumps({**notes, "base_digest": "0" * 64}))
        return "another base", "base_digest"
    (folder / "quire.json").unlink()  # which knows the tensors' digest
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)
    name = next(iter(tensors))
    if kind == "pickle":
        (folder / TENSORS).rename(folder / "adapter_model.bin")
        return "adapter_model.bin", "adapter_model.bin"
    if kind == "no config":
        (folder / CONFIG).unlink()
        return "required", CONFIG
    if kind == "not safetensors":
        (folder / TENSORS).write_bytes(b"\x80\x04 pickle in disguise")
        return TENSORS, ""
    if kind == "config not json":
        (folder / CONFIG).write_text("{")
        return CONFIG, ""
    if kind == "rank":
        config["r"] = 64
        tensors = {key: t.repeat(16, 1) if "lora_A" in key else t.repeat(1, 16) for key, t in tensors.items()}
    if kind == "kind":
        config["peft_type"] = "IA3"
    if kind == "nan":
        tensors[name][0, 0] = float("nan")
    if kind == "shape":
        tensors = {key: t[:, :-1].contiguous() if "lora_A" in key else t for key, t in tensors.items()}
    if kind == "partly":
        tensors[name.replace("layers.0", "layers.7")] = tensors.pop(name)
    if kind == "alpha":
        config["lora_alpha"] = "many"
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / TENSORS)
    return {
        "rank": ("16", "r"), "kind": ("IA3", "peft_type"), "nan": ("finite", ""), "shape": ("shape", ""),
        "partly": ("layers", ""), "alpha": ("lora_alpha", "lora_alpha"),
    }[kind]  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [
        "pickle", "no config", "not safetensors", "config not json", "rank", "kind", "nan", "shape", "partly", "alpha",
        "damaged", "base",
    ],
)  # fmt: skip
def test_a_bad_adapter_is_told_what_is_wrong(
    kind: str, http: httpx.Client, house: RunningServer, tmp_path: Path, tiny_llama: Path
) -> None:
    folder = save_adapter(tmp_path / "bad", tiny_llama, 9)
    word, field = spoiled(kind, folder)
    error = error_of(http.put("/v1/adapters/bad", files=form(folder)), 400)
    assert word in error["message"], error
    assert str(tmp_path) not in error["message"]
    if field:
        assert error["param"] == field
    # The same from the directory and by path: never served, and nothing else is harmed.
    shutil.copytree(folder, tmp_path / "store" / "bad")
    house.application.adapters.look(settled=True)
    answer = http.post("/v1/load_lora_adapter", json={"lora_name": "bad", "lora_path": "bad"})
    assert answer.status_code == (404 if kind == "no config" else 400), answer.text
    error_of(http.post("/v1/completions", json={"model": "bad", "prompt": "a"}), 404)
    assert "bad" not in http.get("/v1/models").text
    assert text_of(http, "given")
    assert not [path for path in (tmp_path / "store").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["..", "a/b", "%2e%2e%2fx", ".hidden", "tiny", "x" * 150, "a b"])
def test_names_that_cannot_be_kept(http: httpx.Client, tmp_path: Path, tiny_llama: Path, name: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    answer = http.put(f"/v1/adapters/{name}", files={CONFIG: ("x", b"{}")})
    assert answer.status_code in (400, 404, 405, 415), answer.text
    assert sorted(tmp_path.rglob("*")) == before


def test_an_upload_has_a_limit_and_leaves_nothing(lora_engine: AsyncEngine, tmp_path: Path, tiny_llama: Path) -> None:
    folder = save_adapter(tmp_path / "large", tiny_llama, 9)
    with RunningServer(lora_engine, lora_dir=str(tmp_path / "store"), max_adapter_bytes=1000) as server:
        for files, status in ((form(folder), 400), ([("file", (TENSORS, bytes(200_000)))], 413)):
            assert httpx.put(f"{server.url}/v1/adapters/large", files=files).status_code == status
        assert list((tmp_path / "store").iterdir()) == []
        assert httpx.put(f"{server.url}/v1/adapters/x", json={}).status_code == 415
        twice = [("file", (CONFIG, b"{}")), ("file", (CONFIG, b"{}"))]
        assert "twice" in error_of(httpx.put(f"{server.url}/v1/adapters/x", files=twice), 400)["message"]
    server.application.adapters.close()


def test_a_crash_between_two_renames_loses_nothing(lora_engine: AsyncEngine, tmp_path: Path, tiny_llama: Path) -> None:
    save_adapter(tmp_path / "store" / ".old-0123-kept", tiny_llama, 3)
    save_adapter(tmp_path / "store" / ".old-0124-other", tiny_llama, 3)
    save_adapter(tmp_path / "store" / "other", tiny_llama, 4)
    (tmp_path / "store" / ".upload-77").mkdir()
    with RunningServer(lora_engine, lora_dir=str(tmp_path / "store")) as server:
        assert server.application.adapters.names() == ["kept", "other"]
    server.application.adapters.close()
    assert {path.name for path in (tmp_path / "store").iterdir()} == {"kept", "other"}
    for name in ("kept", "other"):
        lora_engine.adapters.remove(name)


def test_the_directory_is_followed(http: httpx.Client, house: RunningServer, tmp_path: Path, tiny_llama: Path) -> None:
    adapters, store = house.application.adapters, tmp_path / "store"
    save_adapter(store / "later", tiny_llama, 10)
    adapters.look()
    assert "later" not in adapters  # it might still be being copied
    adapters.look()
    before = text_of(http, "later")
    save_adapter(store / "later", tiny_llama, 11)
    adapters.look()
    adapters.look()
    assert text_of(http, "later") != before
    shutil.rmtree(store / "later")
    adapters.look()
    error_of(http.post("/v1/completions", json={"model": "later", "prompt": "a"}), 404)
    # What was unloaded by request stays away until its files change.
    http.post("/v1/unload_lora_adapter", json={"lora_name": "found"})
    adapters.look()
    adapters.look()
    assert "found" not in adapters


def test_an_adapters_own_chat_template(http: httpx.Client, tmp_path: Path, tiny_llama: Path) -> None:
    folder = save_adapter(tmp_path / "own", tiny_llama, 12, files={"chat_template.jinja": OWN_TEMPLATE})
    assert http.put("/v1/adapters/own", files=form(folder)).json()["own_chat_template"] is True
    messages = [{"role": "user", "content": "hi"}]
    own = http.post("/tokenize", json={"model": "own", "messages": messages}).json()["tokens"]
    base = http.post("/tokenize", json={"model": "tiny", "messages": messages}).json()["tokens"]
    assert own == http.post("/tokenize", json={"prompt": "[hi]", "add_special_tokens": False}).json()["tokens"]
    assert own != base
    chat = http.post("/v1/chat/completions", json={"model": "own", "messages": messages, "max_tokens": 2}).json()
    assert chat["usage"]["prompt_tokens"] == len(own)
    assert TEMPLATE != OWN_TEMPLATE


def test_a_stream_finishes_on_the_weights_it_began_with(
    http: httpx.Client, house: RunningServer, lora_engine: AsyncEngine, tmp_path: Path, tiny_llama: Path
) -> None:
    old, new = (save_adapter(tmp_path / f"weights{seed}", tiny_llama, seed) for seed in (13, 14))
    asked = {"prompt": "the quick brown fox", "max_tokens": 40, "ignore_eos": True}
    http.put("/v1/adapters/live", files=form(old))
    expected = text_of(http, "live", **asked)
    http.put("/v1/adapters/live", files=form(new))
    changed = text_of(http, "live", **asked)
    assert changed != expected
    http.put("/v1/adapters/live", files=form(old))
    got: list[str] = []
    with slow_steps(lora_engine, 0.01):
        reading = threading.Thread(target=lambda: got.append(text_of(http, "live", **asked)))
        reading.start()
        wait_for(lambda: lora_engine.heartbeat().running == 1)
        with httpx.Client(base_url=house.url, timeout=60) as other:
            other.put("/v1/adapters/live", files=form(new))
            assert text_of(other, "live", **asked) == changed  # prefixes of the old weights are not found
            assert other.delete("/v1/adapters/live").status_code == 200
        reading.join()
    assert got == [expected]
    wait_for(lambda: at_rest(house))
    wait_for(lambda: lora_engine._engine._runner.adapters.num_used <= 1)


def test_metrics_name_the_adapters(http: httpx.Client, lora_engine: AsyncEngine) -> None:
    text_of(http, "found")
    text = http.get("/metrics").text
    assert 'vllm:lora_requests_info{max_lora="2",running_lora_adapters="",waiting_lora_adapters=""}' in text
    assert lora_engine.metrics.value("quire:adapter_loads_total", result="ok") > 0
    with slow_steps(lora_engine, 0.01):
        asking = threading.Thread(target=lambda: text_of(http, "found", max_tokens=30, ignore_eos=True))
        asking.start()
        wait_for(lambda: 'running_lora_adapters="found"' in httpx.get(f"{http.base_url}/metrics").text)
        asking.join()


def test_a_server_without_adapters_says_so(server: RunningServer) -> None:
    with httpx.Client(base_url=server.url) as plain:
        for answer in (
            plain.get("/v1/adapters"),
            plain.put("/v1/adapters/x", files={CONFIG: ("x", b"{}")}),
            plain.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "b"}),
        ):
            assert "--enable-lora" in error_of(answer, 403)["message"]


def test_options() -> None:
    assert Module.parse("a=b=c") == Module("a", "b=c")
    assert Module.parse('{"name": "a", "path": "b", "base_model_name": "c"}') == Module("a", "b", "c")
    for wrong in ("a", "=b", "a=", '{"name": "a"}', '{"name": "a", "path": 1}', '{"name": "a", "path": "b", "x": 1}', "{"):
        with pytest.raises(ConfigError, match="lora_modules"):
            ServerOptions(lora_modules=(wrong,))
