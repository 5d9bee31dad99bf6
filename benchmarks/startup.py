"""How long does `quire serve` take from its process to the first token, without and with packed weights kept?

Starts take turns: without the cache, and with one that an earlier start has filled. The first of each kind is not counted: it
reads Python's own files. Beside them: `import torch` alone, which no engine in Python starts without, and the processor's time,
which tells more than seconds do on a machine that does other things too.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import random_model
from benchmarks.engines.checkpoints import REPOSITORY
from benchmarks.engines.llama import free_port
from benchmarks.engines.processes import Running
from benchmarks.engines.served import first_token
from benchmarks.record import Outcome
from quire.cli.bench_http import Server

PROMPT = list(range(5, 25))
OPTIONS = ("--max-model-len", "4096", "--max-num-seqs", "32")
LOAD_SECONDS = 300.0
READY = re.compile(r"Ready after ([\d.]+) s \((.*)\)")
LOADED = re.compile(r"loaded in ([\d.]+) s")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=list(random_model.SHAPES), default="0.5b")
    parser.add_argument("--model", type=Path, help="a folder that is there already; else one is made for the while")
    parser.add_argument("--quantization", help="of the server")
    parser.add_argument("--rounds", type=int, default=5, help="counted starts of each kind")


def run(options: argparse.Namespace) -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        model = options.model or work / "model"
        if options.model is None:
            statement = f"made.write(pathlib.Path({str(model)!r}), made.SHAPES[{options.shape!r}], full_tokenizer=True)"
            subprocess.run(
                [sys.executable, "-c", f"import pathlib; from benchmarks import random_model as made; {statement}"],
                cwd=REPOSITORY,
                check=True,
            )
        kinds = {"without": "off", "kept": str(work / "packed")}
        starts: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
        imports = []
        for number in range(options.rounds + 1):
            imports.append(_import_torch(work))
            for kind, cache in kinds.items():
                words = [str(model), "--packed-cache", cache, *OPTIONS]
                words += ["--quantization", options.quantization] if options.quantization else []
                found = _start(work, words, None if kind == "without" else work / "packed")
                if number:
                    starts[kind].append(found)
                print(f"{kind}: {found}", file=sys.stderr, flush=True)
    medians = {kind: _medians(found) for kind, found in starts.items()}
    numbers = {"import_torch_s": statistics.median(imports[1:]), "medians": medians, "starts": starts}
    return Outcome(_headline(options, medians, numbers["import_torch_s"]), numbers)


def _environment(work: Path) -> dict[str, str]:
    """Compiled Python files are kept, as where Quire is installed, but not in the repository."""
    return {"PYTHONPYCACHEPREFIX": str(work / "compiled"), "PYTHONDONTWRITEBYTECODE": ""}


def _import_torch(work: Path) -> float:
    with Running([sys.executable, "-c", "import torch"], _environment(work), REPOSITORY, work / "log") as process:
        process.process.wait()
        return round(time.monotonic() - process.began, 2)


def _start(work: Path, words: list[str], kept: Path | None) -> dict[str, Any]:
    """One start: seconds until the first token, its parts, the processor's time, the peak of memory. Ends when the packed
    weights are in the folder `kept`."""
    port, log = free_port(), work / f"log-{time.monotonic_ns()}"
    command = [sys.executable, "-m", "quire.cli", "serve", *words, "--port", str(port)]
    with Running(command, _environment(work), REPOSITORY, log) as process:
        found: dict[str, Any] = {"first_token_s": asyncio.run(_first_token(process, port))}
        user, system = (Path("/proc") / str(process.process.pid) / "stat").read_text().rpartition(")")[2].split()[11:13]
        found |= {"cpu_user_s": int(user) / 100, "cpu_system_s": int(system) / 100, "peak_mib": process.peak_mib()}
        deadline = time.monotonic() + LOAD_SECONDS
        while kept is not None and not list(kept.glob("*.packed")) and time.monotonic() < deadline:
            time.sleep(0.2)
    text = log.read_text()
    ready, loaded = READY.search(text), LOADED.search(text)
    assert ready is not None, text
    assert loaded is not None, text
    found["imports_s"] = round(float(loaded[1]) - float(ready[1]), 2)
    for part in ready[2].split(", "):
        name, _, seconds = part.rpartition(" ")
        found[f"{name.replace(' ', '_')}_s"] = float(seconds)
    return found


async def _first_token(process: Running, port: int) -> float:
    server = Server(f"http://127.0.0.1:{port}")
    try:
        async with asyncio.timeout(LOAD_SECONDS):
            await first_token(process, server, PROMPT)
        return round(time.monotonic() - process.began, 2)
    finally:
        await server.close()


def _medians(starts: list[dict[str, Any]]) -> dict[str, float]:
    return {name: round(statistics.median(one[name] for one in starts), 2) for name in starts[0]}


def _headline(options: argparse.Namespace, medians: dict[str, dict[str, float]], torch_seconds: float) -> str:
    def told(kind: str) -> str:
        one = medians[kind]
        cpu = one["cpu_user_s"] + one["cpu_system_s"]
        return f"{one['first_token_s']:.2f} s ({cpu:.1f} s of processor time, {one['peak_mib']:.0f} MiB)"

    form = options.quantization or "bf16"
    return (
        f"{options.shape} {form}, process to first token: {told('without')}, with packed weights kept {told('kept')}; "
        f"import torch alone {torch_seconds:.2f} s"
    )
