"""Builds the native kernels (csrc/) with the package. All else about the package stands in pyproject.toml.

Each kernel file is compiled once per instruction set into one shared library, `quire/ops/cpu/_native.so`, which is loaded with
ctypes: no Python headers, no torch. `CXX` names the compiler (GCC or Clang), whose target counts; `QUIRE_CXXFLAGS` is added to
its flags.
Without a compiler the package installs all the same and computes with torch alone; `quire doctor` says so.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).parent / "csrc"
KERNELS = (
    *("linear", "dense", "integers", "rows", "attention", "lora", "transposed"),
    *("gradients", "attention_backward", "loss", "sampling"),
)
PLAIN = ("dispatch", "check", "pool", "replay")
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
WARNINGS = ["-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # the last two: of its headers
X86 = {
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mfma -mf16c -mprefer-vector-width=512",
    "avx2": "-mavx2 -mfma -mf16c",
    "generic": "",
}
# Two sets that multiply beside the kernels of avx512. AMX's tiles are also emulated, for tests on machines that have none.
BF16 = f"{X86['avx512']} -mavx512bf16"
PAIRS = ("dense", "attention", "attention_backward_pairs", "transposed")
TILES = ("amx", "amx_transposed", "attention", "attention_backward_pairs")
AMX = f"{BF16} -mavx512vbmi"
AMX_TILES = "-mamx-tile -mamx-int8 -mamx-bf16"


def machine_of(compiler: list[str]) -> str:
    """The machine that the compiler compiles for: this one, unless it is a cross compiler."""
    try:
        answer = subprocess.run([*compiler, "-dumpmachine"], text=True, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        answer = platform.machine()
    return answer.strip().lower().partition("-")[0]


def instruction_sets(machine: str) -> dict[str, str]:
    if machine in ("x86_64", "amd64"):
        return X86
    return {"neon": ""} if machine in ("aarch64", "arm64") else {"generic": ""}


def builds(compiler: list[str], switches: str, instruction: str) -> bool:
    """Whether the compiler knows the switches and its assembler the instruction."""
    command = [*compiler, *switches.split(), "-x", "c++", "-c", "-", "-o", os.devnull]
    source = f'void f() {{ asm volatile("{instruction}"); }}'
    return subprocess.run(command, input=source, text=True, capture_output=True, check=False).returncode == 0


class BuildNative(build_ext):
    """Compiles csrc/ and links it, two jobs at a time."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        objects = Path(self.build_temp).resolve()
        objects.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        flags = [*FLAGS, *WARNINGS, *shlex.split(os.environ.get("QUIRE_CXXFLAGS", ""))]
        sets = instruction_sets(machine_of(compiler))
        pairs = "avx512" in sets and builds(compiler, BF16, "vdpbf16ps %zmm0, %zmm0, %zmm0")
        amx = "avx512" in sets and builds(compiler, f"{AMX} {AMX_TILES}", "tilerelease")
        known = [*(["-DQUIRE_BF16_PAIRS"] if pairs else []), *(["-DQUIRE_AMX"] if amx else [])]
        jobs = [(name, objects / f"{name}.o", known) for name in PLAIN]
        for isa, switches in sets.items():
            jobs += [(name, objects / f"{name}_{isa}.o", [f"-DQUIRE_ISA={isa}", *switches.split()]) for name in KERNELS]
        if pairs:
            own = ["-DQUIRE_ISA=avx512_bf16", *BF16.split()]
            jobs += [(name, objects / f"{name}_bf16.o", own) for name in PAIRS]
        if amx:
            real = ["-DQUIRE_ISA=amx", "-DQUIRE_TILES", *AMX.split(), *AMX_TILES.split()]
            emulated = ["-DQUIRE_ISA=amx_emulated", "-DQUIRE_TILES", "-DQUIRE_EMULATED", *AMX.split()]
            for name in TILES:
                jobs += [(name, objects / f"{name}_tiles.o", real), (name, objects / f"{name}_emulated.o", emulated)]

        def compile_one(job: tuple[str, Path, list[str]]) -> None:
            name, made, own = job
            subprocess.run([*compiler, *flags, *own, "-c", str(SOURCE / f"{name}.cpp"), "-o", str(made)], check=True)

        try:
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                list(threads.map(compile_one, jobs))
            made = [str(made) for _, made, _ in jobs]
            subprocess.run([*compiler, *flags, "-shared", "-pthread", *made, "-o", f"{target}.new"], check=True)
            os.replace(f"{target}.new", target)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"quire: the native kernels were not built: {error}", file=sys.stderr)


setup(ext_modules=[Extension("quire.ops.cpu._native", sources=[])], cmdclass={"build_ext": BuildNative})
