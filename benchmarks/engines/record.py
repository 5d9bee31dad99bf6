"""What was measured, as it grows, and the medians that are told of it. Plain values: it goes into a file after every turn."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.engines.workloads import Workload, decode_rate


@dataclass
class Run:
    """One counted run. first_seconds: W1's separate first token. ttft_ms, itl_ms: means over a server's streams."""

    round: int
    seconds: float
    tokens: int
    first_seconds: float | None = None
    ttft_ms: float | None = None
    itl_ms: float | None = None


@dataclass
class Cell:
    """One entry with one workload. problem: why there are no (or no more) runs."""

    runs: list[Run] = field(default_factory=list)
    problem: str | None = None

    def rates(self, workload: Workload) -> list[float]:
        """Tokens a second of each run, in the workload's unit."""
        firsts = [run.first_seconds for run in self.runs if run.first_seconds is not None]
        if firsts:
            first = statistics.median(firsts)
            return [decode_rate(workload.output, run.seconds, first) for run in self.runs]
        return [run.tokens / run.seconds for run in self.runs]

    def rate(self, workload: Workload) -> float | None:
        """The median."""
        rates = self.rates(workload)
        return statistics.median(rates) if rates else None

    def median(self, name: str, scale: float = 1.0) -> float | None:
        values = [scale * getattr(run, name) for run in self.runs if getattr(run, name) is not None]
        return statistics.median(values) if values else None


@dataclass
class Entered:
    """What is known of one entry over all rounds. start_seconds: of its server, from the process to the first token."""

    name: str
    kind: str
    version: str
    installed: bool
    cells: dict[str, Cell] = field(default_factory=dict)
    weight_bytes: int | None = None
    about: str | None = None
    load_seconds: list[float] = field(default_factory=list)
    start_seconds: list[float] = field(default_factory=list)
    peak_mib: list[int] = field(default_factory=list)
    first_tokens: list[int] = field(default_factory=list)

    def cell(self, workload: str) -> Cell:
        return self.cells.setdefault(workload, Cell())

    def give_up(self, workloads: tuple[str, ...], problem: str) -> None:
        """Say why these workloads have no further runs."""
        for name in workloads:
            cell = self.cell(name)
            cell.problem = cell.problem or problem

    def as_dict(self, workloads: dict[str, Workload]) -> dict[str, Any]:
        values = asdict(self)
        for name, cell in self.cells.items():
            rate = cell.rate(workloads[name])
            values["cells"][name]["tokens_per_second"] = round(rate, 2) if rate is not None else None
        return values
