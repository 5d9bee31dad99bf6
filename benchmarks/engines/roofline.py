"""What the machine can do at this moment, measured in processes of their own so that nothing stays behind.

Reading by a small C program that is compiled on the fly; products by torch and by chains of instructions in registers. A limit
is the best of what was measured: anything else on the machine can only lower a measurement.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.engines.checkpoints import REPOSITORY

SOURCE = Path(__file__).with_name("limits.c")
MEBIBYTES = (512, 1024, 4096)
SECONDS = 180.0
TORCH = """
import json, statistics, sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
rates = {}
for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("int8", torch.int8)):
    left, right = torch.ones(2048, 4096).to(dtype), torch.ones(4096, 4096).to(dtype).t()
    product = torch._int_mm if dtype == torch.int8 else torch.mm
    try:
        product(left[:16], right)
    except RuntimeError:
        continue
    best, first = float("inf"), time.perf_counter()
    for _ in range(5):
        begin = time.perf_counter()
        product(left, right)
        best = min(best, time.perf_counter() - begin)
        if time.perf_counter() - first > 5:  # it has no kernel for this type worth the name
            break
    rates[name] = 2 * 2048 * 4096 * 4096 / best
print(json.dumps(rates))
"""
# What the page says about the processor: the instructions that engines choose their kernels by.
FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")


@dataclass
class Limits:
    """Rates per second: bytes read by size of the buffer, operations by kind. Empty where nothing could be measured."""

    time: str
    reads: dict[int, float] = field(default_factory=dict)
    small_page_reads: dict[int, float] = field(default_factory=dict)
    torch: dict[str, float] = field(default_factory=dict)
    registers: dict[str, float] = field(default_factory=dict)
    problem: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Best:
    """The limits over several measurements of one sitting."""

    measured: tuple[Limits, ...]

    def read_rate(self, size: float) -> float | None:
        """Bytes a second that can be read again and again from `size` bytes: a smaller buffer would sit in caches."""
        fitting = [rate for limits in self.measured for bytes_, rate in limits.reads.items() if bytes_ >= 0.8 * size]
        return max(fitting or [rate for limits in self.measured for rate in limits.reads.values()], default=None)

    def multiply_rate(self, kind: str) -> float | None:
        """Operations a second for products of `kind` (float32, bfloat16, int8), which may also be computed in float32."""
        kinds = {kind, "float32"}
        rates = [limits.torch.get(one, 0.0) for limits in self.measured for one in kinds]
        rates += [limits.registers.get(one, 0.0) for limits in self.measured for one in kinds]
        return max(rates, default=0.0) or None


def measure(folder: Path, threads: int, *, mebibytes: tuple[int, ...] = MEBIBYTES, with_torch: bool = True) -> Limits:
    """Measure now. folder: where the program is compiled."""
    limits = Limits(time.strftime("%H:%M", time.gmtime()))
    program = folder / "limits"
    try:
        words = ["cc", "-O3", "-march=native", "-fopenmp", str(SOURCE), "-o", str(program)]
        subprocess.run(words, check=True, capture_output=True, text=True)
        found = _json([str(program), str(threads), *map(str, mebibytes)])
        for read in found["reads"]:
            limits.reads[read["bytes"]] = read["huge_pages"]
            limits.small_page_reads[read["bytes"]] = read["small_pages"]
        limits.registers = {kind: found[f"{kind}_registers"] for kind in ("float32", "bfloat16", "int8")}
        if with_torch:
            limits.torch = _json([sys.executable, "-c", TORCH, str(threads)])
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        limits.problem = " ".join(str(getattr(error, "stderr", None) or error).split())[:300]
    return limits


def flags() -> dict[str, bool]:
    """Which of the instruction sets that matter here the processor offers."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    present = next((set(line.split()) for line in text.splitlines() if line.startswith(("flags", "Features"))), set())
    return {name: name in present for name in FLAGS}


def _json(words: list[str]) -> dict[str, Any]:
    done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=SECONDS, cwd=REPOSITORY)
    found: dict[str, Any] = json.loads(done.stdout)
    return found
