"""Who takes part: each engine with each form of the weights, how its process is started, and which workloads it gets.

An entry whose engine is not installed stays in the list and says so. Knows the peers' folders; runs nothing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.engines.adapters import CACHE_GIB, LENGTH, SEQUENCES, STEP_TOKENS
from benchmarks.engines.checkpoints import Work
from benchmarks.engines.llama import own_benchmark, server_command

ALL = ("W1", "W2", "W3", "W4", "W5", "W6")
QUANTIZED = ("W1", "W2", "W3")
# Quire's forms: (name, kind, the option of the engine).
OURS = (("bf16", "16-bit", None), ("int8", "8-bit", "int8"), ("int4", "4-bit", "int4"))


@dataclass(frozen=True)
class Entry:
    """One engine with one form. kind: 16-bit, 8-bit or 4-bit. checkpoint: a form of `checkpoints`. peer: a key of `peers`.

    engine: the adapter that the worker loads with `options`. server: whether it can also serve W6. own: it is asked by its own
    benchmark's command, which gives W1 and W2.
    """

    name: str
    kind: str
    peer: str | None
    engine: str
    checkpoint: str
    workloads: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    own: bool = False


@dataclass(frozen=True)
class Place:
    """Where everything is. peers: None if there is no such folder. plain: further options of Quire's engine."""

    work: Work
    peers: Path | None
    threads: int
    plain: dict[str, Any] = field(default_factory=dict)

    def installed(self, entry: Entry) -> bool:
        return entry.peer is None or (self.peers is not None and peers.PEERS[entry.peer].installed(self.peers))

    def version(self, entry: Entry) -> str:
        if entry.peer is None:
            import quire

            return quire.__version__
        return peers.PEERS[entry.peer].version

    def worker(self, entry: Entry, workloads: tuple[str, ...] = ()) -> list[str]:
        """The command of the process that answers `worker.py`'s questions."""
        options: dict[str, Any] = {"model": str(self.work.path(entry.checkpoint)), **entry.options}
        if entry.engine == "quire":
            options |= {"threads": self.threads, **self.plain}
            if "W5" in entry.workloads:
                options["lora"] = str(self.work.path("adapters"))
        elif entry.engine in ("transformers", "openvino"):
            options["threads"] = self.threads
        elif entry.engine == "llama.cpp":
            alone = set(workloads) <= {"W1", "W2"}
            options |= {"binaries": str(self._binaries()), "threads": self.threads, "slots": 1 if alone else 32}
        elif "W5" in entry.workloads:
            options["lora"] = str(self.work.path("adapters"))
        return [str(self._python(entry)), "-m", "benchmarks.engines.worker", entry.engine, json.dumps(options)]

    def server(self, entry: Entry, port: int) -> list[str]:
        """The command of an HTTP server with the same room."""
        model = str(self.work.path(entry.checkpoint))
        room = ("--max-model-len", LENGTH, "--max-num-seqs", SEQUENCES, "--max-num-batched-tokens", STEP_TOKENS)
        words: list[Any]
        if entry.engine == "quire":
            words = [self._python(entry), "-m", "quire.cli", "serve", model, "--port", port, "--threads", self.threads, *room]
            words += ["--kv-cache-memory-bytes", CACHE_GIB << 30, "--disable-log-stats"]
            for name, value in {**entry.options, **self.plain}.items():
                words += [f"--{name.replace('_', '-')}", value]
        elif entry.engine == "vllm":
            # `vllm serve` looks for a package called vllm, which the one for CPU is not.
            words = [self._python(entry), "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", port]
            words += ["--dtype", "bfloat16", "--host", "127.0.0.1", *room]
        else:
            words = list(server_command(self._binaries(), Path(model), port, self.threads, 32))
        return [str(word) for word in words]

    def own_benchmark(self, entry: Entry, prompt: int, output: int, repeats: int) -> list[str]:
        return own_benchmark(self._binaries(), self.work.path(entry.checkpoint), self.threads, prompt, output, repeats)

    def environment(self, entry: Entry) -> dict[str, str]:
        """All cores for every engine; nothing is looked up in the network."""
        values = {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "QUIRE_LOG_LEVEL": "WARNING",
            "OMP_NUM_THREADS": str(self.threads),
        }
        if entry.engine == "vllm" and self.peers is not None:
            # Without a binding it keeps one core for itself and computes on the others.
            cores = sorted(os.sched_getaffinity(0))[: self.threads]
            values |= {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)), "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB)}
            values |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
            del values["OMP_NUM_THREADS"]
            preloads = [peers.tcmalloc(self.peers), self.peers / "vllm/lib/libiomp5.so"]
            values["LD_PRELOAD"] = ":".join(str(path) for path in preloads if path and path.exists())
        return values

    def _python(self, entry: Entry) -> Path:
        folder = {"quire": None, "llama.cpp": None, "vllm": "vllm", "transformers": "hf", "openvino": "ov"}[entry.engine]
        if folder is None:
            return Path(sys.executable)
        assert self.peers is not None
        return self.peers / folder / "bin" / "python"

    def _binaries(self) -> Path:
        assert self.peers is not None
        return self.peers / "llama-build" / "bin"


def entries() -> Iterator[Entry]:
    """Everybody, in the order in which they take turns."""
    for name, kind, method in OURS:
        options = {"quantization": method} if method else {"dtype": "bfloat16"}
        workloads = ALL if name == "bf16" else (*QUANTIZED, "W4", "W6")
        yield Entry(f"quire-{name}", kind, None, "quire", "bf16", workloads, options)
    yield Entry("vllm-bf16", "16-bit", "vllm", "vllm", "bf16", ("W1", "W2", "W3", "W4", "W6"))
    yield Entry("vllm-bf16-lora", "16-bit", "vllm", "vllm", "bf16", ("W5",))
    yield Entry("vllm-w8a8", "8-bit", "vllm", "vllm", "w8a8", QUANTIZED)
    yield Entry("vllm-w4a16", "4-bit", "vllm", "vllm", "w4a16", QUANTIZED)
    for form, kind in (("fp16", "16-bit"), ("int8", "8-bit"), ("int4", "4-bit")):
        name = "openvino-bf16" if form == "fp16" else f"openvino-{form}"
        workloads = (*QUANTIZED, "W4") if form == "fp16" else QUANTIZED
        yield Entry(name, kind, "openvino", "openvino", f"ov-{form}", workloads)
    for form, kind in (("bf16", "16-bit"), ("q8_0", "8-bit"), ("q4_0", "4-bit")):
        yield Entry(f"llama.cpp-{form}", kind, "llama.cpp", "llama.cpp", f"gguf-{form}", QUANTIZED)
        yield Entry(f"llama-bench-{form}", kind, "llama.cpp", "llama.cpp", f"gguf-{form}", ("W1", "W2"), own=True)
    yield Entry("transformers-bf16", "16-bit", "hf", "transformers", "bf16", QUANTIZED)
