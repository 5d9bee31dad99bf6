"""Packed weights kept from start to start: the same bits, and nothing that is old, damaged, half written or too much."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quire import ops
from quire.assemble import assemble
from quire.batch import packed
from quire.models.config import read_model_config
from quire.models.decoder import CausalLM
from quire.ops.select import selected
from quire.ops.weights import DenseWeight, Fp8Weight, Int4Weight, Int8Weight, Weight
from quire.quant.packing import packed_weights
from quire.weights import packed_file
from quire.weights.packed_cache import LAYOUT, SUFFIX, PackedCache, entries, key_of, packed_cache
from quire.weights.packed_file import Damaged, Reading, clear_parts, write
from tests.conftest import write_model

pytestmark = pytest.mark.skipif(selected().__name__ != "quire.ops.cpu", reason="only native kernels have packed weights")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", torch_dtype="bfloat16", tie_word_embeddings=False, hidden_size=64)


def started(folder: Path, cache: PackedCache | None, quantization: str | None = None) -> CausalLM:
    if cache is not None:
        cache.begin(2)
    model = assemble(folder, read_model_config(folder), "bfloat16", quantization, cache=cache)
    _wait()
    return model


def _wait() -> None:
    for thread in threading.enumerate():
        if thread.name == "quire-keep":
            thread.join()


def the_cache(tmp_path: Path, folder: Path, quantization: str | None = None) -> PackedCache:
    cache = packed_cache(str(tmp_path / "kept"), folder, "bfloat16", quantization)
    assert cache is not None
    return cache


@torch.inference_mode()
def logits(model: CausalLM) -> torch.Tensor:
    return model.logits(model(packed([[5, 6, 7, 8], [9, 10]])))


@pytest.mark.parametrize("tied", [False, True], ids=("untied", "tied"))
@pytest.mark.parametrize("quantization", [None, "int8", "int4", "fp8"])
def test_a_start_from_the_cache_gives_the_same_bits(tmp_path: Path, quantization: str | None, tied: bool) -> None:
    folder = write_model(tmp_path / "model", torch_dtype="bfloat16", tie_word_embeddings=tied)
    expected = logits(started(folder, None, quantization))
    cache = the_cache(tmp_path, folder, quantization)
    first = started(folder, cache, quantization)
    assert cache.path.exists()
    # The files say nothing now, so what is the same can only come from the cache.
    weights = folder / "model.safetensors"
    facts = weights.stat()
    hidden = bytearray(weights.read_bytes())
    hidden[-4096:] = bytes(4096)
    weights.write_bytes(hidden)
    other = PackedCache(cache.folder, cache.key)
    second = started(folder, other, quantization)
    assert facts.st_size == weights.stat().st_size
    for model in (first, second):
        assert torch.equal(logits(model), expected)
    assert {n: p.shape for n, p in second.named_parameters()} == {n: p.shape for n, p in first.named_parameters()}
    assert packed_weights(second).keys() == packed_weights(first).keys()


def test_a_changed_checkpoint_has_another_name(tmp_path: Path, checkpoint: Path) -> None:
    before = the_cache(tmp_path, checkpoint)
    started(checkpoint, before)
    weights = checkpoint / "model.safetensors"
    facts = weights.stat()
    changed = bytearray(weights.read_bytes())
    changed[-100:] = bytes(100)
    weights.write_bytes(changed)
    os.utime(weights, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # as if nothing had happened
    after = the_cache(tmp_path, checkpoint)
    assert after.key != before.key
    assert torch.equal(logits(started(checkpoint, after)), logits(started(checkpoint, None)))
    assert len({key_of(checkpoint, form) for form in ("bfloat16 None", "float32 None", "bfloat16 int8")}) == 3
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6}))
    assert the_cache(tmp_path, checkpoint).key not in (before.key, after.key)


def _cut(data: bytearray) -> None:
    del data[-1:]


def _flip_first(data: bytearray) -> None:
    data[0] ^= 1


def _flip_header(data: bytearray) -> None:
    data[100] ^= 4


def _flip_data(data: bytearray) -> None:
    data[len(data) // 2] ^= 16


def _flip_last(data: bytearray) -> None:
    data[-1] ^= 128


def _empty(data: bytearray) -> None:
    data.clear()


@pytest.mark.parametrize("damage", [_cut, _flip_first, _flip_header, _flip_data, _flip_last, _empty])
def test_a_damaged_file_is_not_used_and_made_again(
    tmp_path: Path, checkpoint: Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    cache = the_cache(tmp_path, checkpoint)
    expected = logits(started(checkpoint, cache))
    whole = cache.path.read_bytes()
    data = bytearray(whole)
    damage(data)  # type: ignore[operator]
    cache.path.write_bytes(data)
    with caplog.at_level("WARNING", "quire"):
        again = started(checkpoint, cache)
    assert "not used and made again" in caplog.text
    assert torch.equal(logits(again), expected)
    assert cache.path.read_bytes() == whole


def test_a_file_that_lies_about_its_weights_is_not_used(tmp_path: Path, checkpoint: Path) -> None:
    cache = the_cache(tmp_path, checkpoint)
    expected = logits(started(checkpoint, cache))
    reading = Reading(cache.path, cache.key, 1)
    facts, memory = reading.result()
    for change in (
        lambda e: e["packed"] and e["packed"].update(outputs=e["packed"]["outputs"] + 32),
        lambda e: e["packed"] and e["packed"].update(form=1),
        lambda e: e["packed"] and e["packed"].update(form=9),
        lambda e: e.update(name=e["name"] + "x"),
        lambda e: e["tensors"][0].__setitem__(2, [1 << 40]),
        lambda e: e["tensors"][0].__setitem__(1, "object"),
    ):
        lie = json.loads(json.dumps(facts))
        change(lie["entries"][0])
        cache.path.unlink(missing_ok=True)
        write(cache.path, cache.key, lie, [memoryview(memory)])
        assert torch.equal(logits(started(checkpoint, cache)), expected)
    with pytest.raises(Damaged, match="something else"):
        Reading(cache.path, "another key", 1)


KILLED = """
import sys, os, signal
from pathlib import Path
from quire.weights import packed_file
real, count = os.write, 0
def dying(handle, data):
    global count
    count += 1
    if count == int(sys.argv[2]):
        real(handle, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return real(handle, data)
packed_file.STRETCH = 1000
os.write = dying
packed_file.write(Path(sys.argv[1]), "key", {}, [memoryview(bytes(range(250)) * 20)])
"""


@pytest.mark.parametrize("when", [1, 3, 6])
def test_a_kill_while_writing_leaves_nothing_that_is_used(tmp_path: Path, when: int) -> None:
    path = tmp_path / f"key{SUFFIX}"
    ran = subprocess.run([sys.executable, "-c", KILLED, str(path), str(when)], check=False)
    assert ran.returncode == -signal.SIGKILL
    assert not path.exists()
    assert [one.name.endswith(packed_file.PART) for one in tmp_path.iterdir()] == [True]
    clear_parts(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_somebody_writes_is_not_cleared(tmp_path: Path) -> None:
    part = tmp_path / f".key.1{packed_file.PART}"
    with part.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert packed_file.being_written(tmp_path, "key")
        assert not packed_file.being_written(tmp_path, "other")
        clear_parts(tmp_path)
        assert part.exists()
    assert not packed_file.being_written(tmp_path, "key")


TWO = """
import sys, torch
from pathlib import Path
from tests.weights.test_packed_cache import logits, started, the_cache
folder, place = Path(sys.argv[1]), Path(sys.argv[2])
cache = the_cache(place, folder)
print(logits(started(folder, cache)).double().sum().item())
"""


def test_starts_at_the_same_time(tmp_path: Path, checkpoint: Path) -> None:
    words = [sys.executable, "-c", TWO, str(checkpoint), str(tmp_path)]
    root = Path(__file__).parents[2]
    running = [subprocess.Popen(words, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sums = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    cache = the_cache(tmp_path, checkpoint)
    assert sums == {f"{logits(started(checkpoint, cache)).double().sum().item()}\n"}
    assert [one.path for one in entries(cache.folder)] == [cache.path]
    assert [one.name for one in cache.folder.iterdir()] == [cache.path.name]


def test_the_file_that_was_not_used_for_longest_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QUIRE_PACKED_CACHE_BYTES", "40000")
    for number in range(5):
        cache = PackedCache(tmp_path, f"{number}")
        cache.keep({}, [memoryview(bytes(8000))])
        os.utime(cache.path, (number, number))
        if number == 2:  # the first one is used again
            first = PackedCache(tmp_path, "0")
            first.begin(1)
            assert first.fetch() is not None
            assert first.path.stat().st_mtime > time.time() - 60
    assert [one.path.stem for one in entries(tmp_path)] == ["3", "4", "0"]
    with caplog.at_level("INFO", "quire"):
        PackedCache(tmp_path, "large").keep({}, [memoryview(bytes(50000))])
    assert "are not kept" in caplog.text
    assert len(entries(tmp_path)) == 3


def test_an_impossible_folder_is_only_logged(tmp_path: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "kept").write_text("a file where the folder should be")
    with caplog.at_level("WARNING", "quire"):
        model = started(checkpoint, the_cache(tmp_path, checkpoint))
    assert "could not be kept" in caplog.text
    assert torch.equal(logits(model), logits(started(checkpoint, None)))


@pytest.mark.parametrize("sizes", [[], [0], [1], [7, 0, 9], [1000], [999, 1001, 64, 5]])
def test_any_sizes_come_back(tmp_path: Path, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_file, "STRETCH", 1000)
    data = [os.urandom(size) for size in sizes]
    path = tmp_path / f"key{SUFFIX}"
    write(path, "key", {"of": "it"}, [memoryview(one) for one in data])
    facts, memory = Reading(path, "key", 3).result()
    assert facts == {"of": "it"}
    for place, one in zip(packed_file.places(sizes), data, strict=True):
        assert place.start % packed_file.ALIGNED == 0
        assert bytes(memory[place.start : place.start + place.size]) == one


def _weights() -> Iterator[Weight]:
    values = (torch.arange(40 * 64) % 251).view(40, 64)
    yield DenseWeight(values.float())
    yield DenseWeight(values.to(torch.bfloat16))
    yield DenseWeight(values.to(torch.float16))
    yield Fp8Weight(values.float().to(torch.float8_e4m3fn), torch.ones(40))
    yield Int8Weight((values - 125).to(torch.int8), torch.ones(40))
    groups = torch.arange(80).view(40, 2)
    yield Int4Weight(values[:, :32].to(torch.uint8), groups.float(), (groups % 16).to(torch.uint8), 32)


LAYOUTS = {1: "85542e7ae862ef19", 2: "e1521d3dfe99f25e"}


def test_a_new_layout_has_a_new_number() -> None:
    digest = hashlib.sha256()
    for weight in _weights():
        facts, parts = ops.packed_parts(ops.pack(weight))
        digest.update(json.dumps(dict(facts)).encode())
        for name, part in parts.items():
            digest.update(name.encode() + part.contiguous().view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest()[:16] == LAYOUTS[LAYOUT], "add LAYOUT + 1 and its digest"
