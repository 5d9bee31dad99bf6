"""Where results go: one dated JSON file each, and a line in the page. Records the machine's kind, never its name."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Outcome:
    """headline: the answer in one line. numbers: everything that was measured."""

    headline: str
    numbers: dict[str, Any]


def machine() -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
    }


def record(name: str, options: Mapping[str, Any], outcome: Outcome) -> str:
    """Write the result; returns its file, relative to the repository."""
    now = datetime.now(UTC)
    path = HERE / "results" / f"{now:%Y-%m-%d-%H%M}-{name}.json"
    path.parent.mkdir(exist_ok=True)
    entry = {"benchmark": name, "time": f"{now:%Y-%m-%dT%H:%MZ}", "machine": machine(), "options": dict(options)}
    path.write_text(json.dumps({**entry, **outcome.numbers}, indent=1) + "\n")
    with (HERE / "README.md").open("a") as page:
        page.write(f"| {now:%Y-%m-%d} | {name} | {outcome.headline} | [{path.name}](results/{path.name}) |\n")
    return f"benchmarks/results/{path.name}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
