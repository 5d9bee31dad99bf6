"""The kernels of NEON in an emulated processor: the bits of AVX2, in every kernel.

csrc/ is compiled for aarch64 by setup.py with a cross compiler, at a level of optimization that compiles quickly (which one
changes no bit: docs/log.md has the comparison with the library's own flags).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quire.ops.cpu import library

ROOT = Path(__file__).parents[2]
CROSS, EMULATOR, HERE = "aarch64-linux-gnu-g++", "qemu-aarch64-static", "c++"
PROGRAM = ["-std=c++17", "-O1", f"-I{ROOT / 'csrc'}", "-pthread", str(ROOT / "tests" / "native" / "digests.cpp")]


def lines(*command: str | Path) -> list[str]:
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return done.stdout.splitlines()


def test_neon_gives_the_bits_of_avx2(tmp_path: Path) -> None:
    for needed in (CROSS, EMULATOR, HERE):
        if not shutil.which(needed):
            pytest.skip(f"{needed} is not installed")
    if "avx2" not in library.isas():
        pytest.skip("this machine has no AVX2 to compare with")
    here, there = tmp_path / "here", tmp_path / "there"
    lines(HERE, *PROGRAM, library.PATH, f"-Wl,-rpath,{library.PATH.parent}", "-o", here)
    into = ["--build-temp", tmp_path / "objects", "--build-lib", tmp_path / "library"]
    command = [sys.executable, "setup.py", "build_ext", *into]
    environment = {**os.environ, "CXX": CROSS, "QUIRE_CXXFLAGS": "-O1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
    objects = sorted((tmp_path / "objects").glob("**/*.o"))
    assert objects, built.stdout + built.stderr
    lines(CROSS, *PROGRAM, *objects, "-static", "-o", there)

    expected, found = lines(here, "avx2", "1"), lines(EMULATOR, there, "neon", "2")
    assert len(found) == len(expected) > 1000
    assert not [(one, other) for one, other in zip(found, expected, strict=True) if one != other]
