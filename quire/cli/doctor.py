"""`quire doctor`: the machine, the installation, and what is wrong with them, each with its fix.

Every check gives facts and at most one problem; a check that itself fails is a finding, never a crash. Only the last one
imports torch, and says so if it cannot.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from quire import __version__, envs
from quire.cli.command import SectionedCommand, json_flag
from quire.plan.hardware import Hardware, probe
from quire.plan.memory import size_text

PACKAGES = (
    *("torch", "numpy", "safetensors", "tokenizers", "huggingface_hub", "jinja2"),
    *("fastapi", "uvicorn", "pydantic", "prometheus_client", "click", "rich"),
)
OPTIONAL = ("transformers", "openai", "llguidance")
COMPILERS = ("g++", "clang++", "c++")
LEAST_PYTHON = (3, 11)
LITTLE_MEMORY, LITTLE_DISK = 1 << 30, 2 << 30
BANDWIDTH_BYTES = 64 << 20


@dataclass(frozen=True)
class Finding:
    """One line of the report. severity: ok, warning (works, but worse) or error (something will not work)."""

    section: str
    name: str
    value: str
    severity: str = "ok"
    problem: str | None = None
    fix: str | None = None


def warning(section: str, name: str, value: str, problem: str, fix: str) -> Finding:
    return Finding(section, name, value, "warning", problem, fix)


def error(section: str, name: str, value: str, problem: str, fix: str) -> Finding:
    return Finding(section, name, value, "error", problem, fix)


@click.command("doctor", cls=SectionedCommand)
@click.option("--port", default=8000, show_default=True, help="Port to look at.")
@click.option("--no-torch", is_flag=True, help="Leave out what needs torch (it takes seconds).")
@json_flag
def command(port: int, no_torch: bool, as_json: bool) -> int:
    """Report machine, memory, instruction sets, versions, compilers, disk, hub and port, and what is wrong.

    The exit code is 1 if something will not work.
    """
    hardware = probe()
    checks: list[Callable[[], Iterator[Finding]]] = [
        lambda: machine(hardware),
        python,
        packages,
        compilers,
        disk,
        hub,
        lambda: port_free(port),
        embedded_model,
    ]
    if not no_torch:
        checks.append(lambda: torch_section(hardware))
    findings = [finding for check in checks for finding in _survive(check)]
    broken = any(finding.severity == "error" for finding in findings)
    if as_json:
        click.echo(json.dumps({"well": not broken, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        _print(findings)
    return 1 if broken else 0


def _survive(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    found: list[Finding] = []
    try:
        found.extend(check())
    except Exception as fault:
        found.append(warning("doctor", "check", type(fault).__name__, f"a check failed: {fault}", "report this as a bug"))
    return found


def _print(findings: list[Finding]) -> None:
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            click.echo(f"{section}:")
        mark = {"ok": " ", "warning": "!", "error": "X"}[finding.severity]
        click.echo(f"{mark} {finding.name:<20} {finding.value}")
    wrong = [finding for finding in findings if finding.problem]
    click.echo("\nNothing is wrong." if not wrong else "\nWhat is wrong:")
    for number, finding in enumerate(wrong, 1):
        click.echo(f"  {number}  {finding.severity}: {finding.problem}\n     fix: {finding.fix}")


def machine(hardware: Hardware) -> Iterator[Finding]:
    section = "Machine"
    yield Finding(section, "system", f"{platform.system()} {platform.release()} {platform.machine()}")
    usable, present = hardware.cores, os.cpu_count() or 1
    yield Finding(section, "cores", f"{usable} usable of {present}")
    isa = ", ".join(hardware.isa) or "none of AMX, AVX-512, AVX2, NEON"
    if hardware.isa:
        yield Finding(section, "instruction sets", isa)
    else:
        yield warning(section, "instruction sets", isa, "no vector instructions were found", "expect slow answers here")
    memory = f"{size_text(hardware.memory_free)} free of {size_text(hardware.memory_total)}"
    if hardware.memory_free < LITTLE_MEMORY:
        fix = "end other programs, or raise the container's memory limit; 'quire serve --preset memory' needs least"
        yield warning(section, "memory", memory, f"only {size_text(hardware.memory_free)} of memory is free", fix)
    else:
        yield Finding(section, "memory", memory)


def python() -> Iterator[Finding]:
    version = platform.python_version()
    if sys.version_info < LEAST_PYTHON:
        yield error("Python", "python", version, f"Python {version} is too old", "install Python 3.11 or newer")
    else:
        yield Finding("Python", "python", version)
    yield Finding("Python", "quire", __version__)
    inside = sys.prefix != sys.base_prefix
    yield Finding("Python", "environment", "virtual" if inside else "system")


def packages() -> Iterator[Finding]:
    for name in PACKAGES:
        try:
            yield Finding("Packages", name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield error("Packages", name, "missing", f"the package {name} is missing", f"pip install {name}")
    for name in OPTIONAL:
        try:
            yield Finding("Packages", name, importlib.metadata.version(name) + " (optional)")
        except importlib.metadata.PackageNotFoundError:
            yield Finding("Packages", name, "not installed (optional)")


def compilers() -> Iterator[Finding]:
    for name in COMPILERS:
        path = shutil.which(name)
        if path is None:
            continue
        run = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
        first = (run.stdout or run.stderr).splitlines()[:1]
        yield Finding("Compilers", name, first[0] if first else "answers nothing")
        return
    fix = "install g++ or clang++ (on Debian: apt install g++), then reinstall Quire"
    yield warning("Compilers", "C++", "none found", "no C++ compiler, so native kernels cannot be built", fix)


def disk() -> Iterator[Finding]:
    for name, folder in (("quire cache", envs.cache_dir()), ("hub cache", _hub_cache())):
        there = folder
        while not there.exists():
            there = there.parent
        usage = shutil.disk_usage(there)
        value = f"{size_text(usage.free)} free at {_redacted(folder)}"
        if not os.access(there, os.W_OK):
            variable = "QUIRE_CACHE" if name == "quire cache" else "HF_HOME"
            fix = f"point {variable} to a folder that you own"
            yield error("Disk", name, value, f"{_redacted(folder)} cannot be written", fix)
        elif usage.free < LITTLE_DISK:
            fix = "delete models that you no longer need from the hub's cache"
            yield warning("Disk", name, value, f"only {size_text(usage.free)} of disk is free", fix)
        else:
            yield Finding("Disk", name, value)


def hub() -> Iterator[Finding]:
    cached = len(list(_hub_cache().glob("models--*")))
    yield Finding("Hub", "models in the cache", str(cached))
    yield Finding("Hub", "mode", "offline (HF_HUB_OFFLINE)" if envs.offline() else "online, asked only for models not here")
    token = any(os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")) or _token_file().is_file()
    yield Finding("Hub", "token", "set" if token else "none (only gated models need one)")


def port_free(port: int) -> Iterator[Finding]:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe_socket:
        probe_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe_socket.bind(("127.0.0.1", port))
            yield Finding("Port", str(port), "free")
        except (OSError, OverflowError) as fault:
            value = getattr(fault, "strerror", None) or str(fault)
            yield warning("Port", str(port), value, f"port {port} cannot be used: {value}", f"quire serve --port {port + 1}")


def embedded_model() -> Iterator[Finding]:
    from quire.weights.hub import EMBEDDED

    folder = EMBEDDED / "quire-tiny"
    missing = [name for name in ("config.json", "tokenizer.json", "model.safetensors") if not (folder / name).is_file()]
    if missing:
        problem = f"quire-tiny, the model of the package, lacks {', '.join(missing)}"
        yield error("Model", "quire-tiny", "incomplete", problem, "reinstall Quire")
    else:
        yield Finding("Model", "quire-tiny", size_text((folder / "model.safetensors").stat().st_size))


def torch_section(hardware: Hardware) -> Iterator[Finding]:
    start = time.monotonic()
    try:
        import torch
    except Exception as fault:  # a broken installation raises anything
        yield error("Torch", "import", "fails", f"torch cannot be imported: {fault}", "pip install --force-reinstall torch")
        return
    yield Finding("Torch", "import", f"{torch.__version__}, {time.monotonic() - start:.1f} s")
    yield Finding("Torch", "threads", str(torch.get_num_threads()))
    if torch.get_num_threads() > hardware.cores:
        problem = f"torch would use {torch.get_num_threads()} threads on {hardware.cores} usable cores"
        yield warning(
            "Torch", "thread count", str(torch.get_num_threads()), problem, f"export OMP_NUM_THREADS={hardware.cores}"
        )
    x = torch.ones(64, 64, dtype=torch.bfloat16)
    right = bool((x @ x == 64).all())
    if right:
        yield Finding("Torch", "bfloat16 product", "right")
    else:
        yield error(
            "Torch", "bfloat16 product", "wrong", "torch multiplies wrongly here", "pip install --force-reinstall torch"
        )
    yield from _operations()
    if torch.cuda.is_available():
        yield Finding("Torch", "GPU", f"{torch.cuda.get_device_name()} (not used: this version computes on the CPU)")
    yield Finding("Torch", "memory bandwidth", f"{_bandwidth() / 1e9:.1f} GB/s copied (what decoding is bound by)")


def _operations() -> Iterator[Finding]:
    from quire.ops.cpu import library
    from quire.ops.select import selected

    yield Finding("Kernels", "operations", selected().__name__)
    if library.available():
        can_run = [name for name in library.isas() if not name.endswith("-emulated")]
        yield Finding("Kernels", "instruction set", f"{library.isa()} (this machine can run {', '.join(can_run)})")
        if library.isa_note():
            yield Finding("Kernels", "not used", library.isa_note())
        if not library.right(library.isa()):
            problem, fix = "known products come out wrong", "export QUIRE_ISA=" + can_run[-1]
            yield error("Kernels", "known products", "wrong", problem, fix)
        return
    problem = "the native kernels were not built: everything works, many times slower"
    yield warning("Kernels", "native", "not built", problem, "install a C++ compiler (apt install g++), then reinstall Quire")


def _bandwidth() -> float:
    """Bytes a second that all threads together read and write, the best of five."""
    import torch

    source = torch.ones(BANDWIDTH_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * BANDWIDTH_BYTES / best


def _hub_cache() -> Path:
    """As huggingface_hub finds it, which may itself be what is broken here."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()


def _token_file() -> Path:
    return _hub_cache().parent / "token"


def _redacted(path: Path) -> str:
    """The path without the user's home, so that a report can be shown to others."""
    home = str(Path.home())
    return "~" + str(path)[len(home) :] if str(path).startswith(home) else str(path)
