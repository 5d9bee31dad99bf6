"""`quire cache`: what is kept is listed and cleared, and what a command begins ahead of torch does no harm."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from quire.weights.packed_cache import PackedCache
from quire.weights.packed_file import PART
from tests.cli.running import Quire, fresh


def test_list_and_clear(quire: Quire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path))
    assert "In all: 0 files" in quire("cache").out
    folder = tmp_path / "packed"
    for name in ("aa", "bb"):
        PackedCache(folder, name).keep({}, [memoryview(bytes(5000))])
    (folder / f".cc.1{PART}").write_bytes(b"left behind")
    (folder / "mine.txt").write_text("not of the cache")
    os.utime(folder / "bb.packed", (1, 1))
    listed = quire("cache", "list").out
    assert listed.index("aa.packed") < listed.index("bb.packed")
    facts = json.loads(quire("cache", "list", "--json").out)
    assert facts["bytes"] == sum(path.stat().st_size for path in folder.glob("*.packed")) >= 10000
    assert [Path(one["path"]).stem for one in facts["files"]] == ["bb", "aa"]
    assert "Cleared: 2 files" in quire("cache", "clear", "--packed-cache", str(folder)).out
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    assert quire("cache", "burn").code == 2


def test_a_second_command_takes_what_the_first_kept(tiny_llama: Path, tmp_path: Path) -> None:
    words = ("generate", "hello", "--model", str(tiny_llama), "--max-tokens", "4", "--temperature", "0")
    folder = tmp_path / "kept"
    plain = fresh(*words)
    first = fresh(*words, "--packed-cache", str(folder))
    (file,) = folder.glob("*.packed")
    os.utime(file, (1, 1))
    second = fresh(*words, "--packed-cache", str(folder))
    assert plain.code == first.code == second.code == 0, first.err + second.err
    assert plain.out == first.out == second.out
    assert file.stat().st_mtime > 1  # it was used


def test_a_wrong_limit_is_told_at_once(quire: Quire, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_PACKED_CACHE_BYTES", "10G")
    ran = quire("serve", str(tiny_llama), "--packed-cache", "auto")
    assert ran.code == 3
    assert "QUIRE_PACKED_CACHE_BYTES" in ran.err
