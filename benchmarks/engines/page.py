"""The Markdown page of a sitting: what Quire reaches beside the best peer of each cell, and beside the machine's limit."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.engines.bounds import bound
from benchmarks.engines.record import Entered
from benchmarks.engines.roofline import Best, Limits
from benchmarks.engines.workloads import Workload
from benchmarks.random_model import Shape

KINDS = ("16-bit", "8-bit", "4-bit")
PRODUCTS = ("float32", "bfloat16", "int8")
OURS = "quire-"
NOTES = """
How to read this. Rates are medians over all rounds; an engine is started anew in every round, and the engines take turns.
"of the limit" sets a rate against the least work that no engine can leave out (weights read once a step at the best rate that
a tuned read reached in this sitting, products at the best rate that was measured for them), so 100 % is out of reach. Weight
bytes differ between engines: vLLM keeps the head in bfloat16 where llama.cpp and OpenVINO take it to 8 bits; "4-bit" is not one
thing. llama.cpp's rows are asked through its own server; llama-bench's rows are its own benchmark, which draws from an empty
context. Peak memory is the sum of the peaks of all processes of an engine (shared pages count twice), with 4 GiB of KV cache
where an engine reserves it. Gaps under about a tenth say nothing unless they repeat.
"""


def page(
    facts: dict[str, Any],
    told: Sequence[Entered],
    workloads: dict[str, Workload],
    shape: Shape,
    limits: Sequence[Limits],
) -> str:
    """Everything. facts: machine, options, time."""
    best = Best(tuple(limits))
    parts = [
        f"# Engines on one machine: {facts['shape']}, {facts['time']}\n",
        _machine(facts),
        "\n## The machine's limits\n\n",
        _limits(limits),
        "\n## Quire beside the best peer of each cell\n\n",
        _summary(told, workloads, shape, best),
    ]
    for kind in KINDS:
        rows = [entered for entered in told if entered.kind == kind]
        if rows:
            parts += [f"\n## All engines, {kind}\n\n", _rates(rows, workloads, shape, best)]
    parts += ["\n## Start, memory and serving\n\n", _starts(told, workloads)]
    if any(entered.first_tokens for entered in told):
        parts += ["\n## The same model?\n\n", _agreement(told)]
    problems = _problems(told)
    if problems:
        parts += ["\n## Not measured\n\n", problems]
    return "".join([*parts, NOTES])


def summary(
    told: Sequence[Entered], workloads: dict[str, Workload], shape: Shape, best: Best
) -> list[dict[str, Any]]:
    """For each workload and kind: Quire's rate, the best peer and its rate, the ratio, the fraction of the limit."""
    rows = []
    for workload in workloads.values():
        for kind in KINDS:
            ours = next((e for e in told if e.kind == kind and e.name.startswith(OURS)), None)
            peers = [e for e in told if e.kind == kind and not e.name.startswith(OURS)]
            rated = [(rate, e.name) for e in peers if (rate := _rate(e, workload)) is not None]
            rate = _rate(ours, workload) if ours else None
            if rate is None and not rated:
                continue
            peer_rate, peer = max(rated, default=(None, None))
            reached = _reached(ours, workload, shape, best) if ours else None
            rows.append(
                {
                    "workload": workload.name,
                    "kind": kind,
                    "quire": rate,
                    "problem": ours.cells[workload.name].problem if ours and workload.name in ours.cells else None,
                    "peer": peer,
                    "peer_rate": peer_rate,
                    "ratio": rate / peer_rate if rate and peer_rate else None,
                    "of_limit": reached,
                }
            )
    return rows


def headline(rows: list[dict[str, Any]]) -> str:
    """Quire against the best peer of each cell, in one line."""
    parts = []
    for row in rows:
        if row["quire"]:
            against = f"{row['ratio']:.2f}x {row['peer']}" if row["ratio"] else "no peer"
            parts.append(f"{row['workload']} {row['kind']} {_number(row['quire'])} ({against}, {_percent(row['of_limit'])})")
    return "; ".join(parts) or "Quire was not measured"


def _rate(entered: Entered, workload: Workload) -> float | None:
    return entered.cells[workload.name].rate(workload) if workload.name in entered.cells else None


def _reached(entered: Entered, workload: Workload, shape: Shape, best: Best) -> float | None:
    """The fraction of the limit, None where one of the two is missing."""
    rate = _rate(entered, workload)
    if rate is None or not entered.weight_bytes:
        return None
    most = bound(workload, shape, entered.kind, entered.weight_bytes, best)
    return rate / most if most else None


def _machine(facts: dict[str, Any]) -> str:
    there = [name for name, present in facts["flags"].items() if present]
    missing = [name for name, present in facts["flags"].items() if not present]
    lines = [
        f"Processor: {facts['processor']}, {facts['threads']} threads, {facts['memory_gib']} GiB of memory, "
        f"huge pages: {facts['huge_pages']}.",
        f"Instruction sets: {', '.join(there) or 'none of those looked for'}; not there: {', '.join(missing) or 'none'}.",
        f"Load average before: {facts['load_average']}. Quire at {facts['code']}, QUIRE_OPS={facts['ops']}.",
        f"Plan: {facts['rounds']} rounds, {facts['repeats']} counted runs of each workload in a round, at most "
        f"{facts['limit']:.0f} s for a cell in a round.{' The sitting was broken off.' if facts.get('broken_off') else ''}",
    ]
    return "\n".join(lines) + "\n"


def _limits(limits: Sequence[Limits]) -> str:
    sizes = sorted({size for one in limits for size in one.reads})
    head = ["time", *(f"read {size >> 20} MiB, GB/s" for size in sizes), "the same, small pages"]
    head += [f"{kind}, GFLOP/s: torch / registers" for kind in PRODUCTS]
    rows = []
    for one in (one for one in limits if one.reads):
        small = " ".join(_number(one.small_page_reads.get(size), 1e9) for size in sizes)
        both = [(one.torch.get(kind), one.registers.get(kind)) for kind in PRODUCTS]
        rates = [f"{_number(by_torch, 1e9)} / {_number(in_registers, 1e9)}" for by_torch, in_registers in both]
        rows.append([one.time, *(_number(one.reads.get(size), 1e9) for size in sizes), small, *rates])
    problems = "".join(f"\nLimits at {one.time} are missing: {one.problem}\n" for one in limits if one.problem)
    return _table(head, rows) + problems


def _summary(told: Sequence[Entered], workloads: dict[str, Workload], shape: Shape, best: Best) -> str:
    rows = []
    for row in summary(told, workloads, shape, best):
        workload = workloads[row["workload"]]
        ours = _number(row["quire"]) if row["quire"] is not None else row["problem"] or "-"
        peer = f"{_number(row['peer_rate'])} {row['peer']}" if row["peer"] else "-"
        ratio = f"{row['ratio']:.2f}x" if row["ratio"] else "-"
        cells = [f"{workload.name} {workload.title}", workload.unit, row["kind"], ours, peer, ratio, _percent(row["of_limit"])]
        rows.append(cells)
    return _table(["workload", "unit", "weights", "Quire", "best peer", "Quire / peer", "Quire of the limit"], rows)


def _rates(told: Sequence[Entered], workloads: dict[str, Workload], shape: Shape, best: Best) -> str:
    """Rate, spread and fraction of every cell."""
    head = ["engine", "version", "weights, GB", *(f"{w.name}, {w.unit}" for w in workloads.values())]
    rows = []
    for entered in told:
        size = f"{entered.weight_bytes / 1e9:.3f}" if entered.weight_bytes else "-"
        cells = [_cell(entered, workload, shape, best) for workload in workloads.values()]
        rows.append([entered.name, entered.about or entered.version, size, *cells])
    return _table(head, rows)


def _cell(entered: Entered, workload: Workload, shape: Shape, best: Best) -> str:
    cell = entered.cells.get(workload.name)
    if cell is None:
        return "-"
    rates = cell.rates(workload)
    if not rates:
        if not entered.installed:
            return "not installed"
        return {None: "-", "not built": "not built"}.get(cell.problem, "none, see below")
    words = _number(statistics.median(rates))
    if len(rates) > 1:
        words += f" ({_number(min(rates))}-{_number(max(rates))})"
    reached = _reached(entered, workload, shape, best)
    return words + (f", {_percent(reached)}" if reached is not None else "")


def _starts(told: Sequence[Entered], workloads: dict[str, Workload]) -> str:
    rows = []
    for entered in told:
        if not (entered.load_seconds or entered.start_seconds):
            continue
        row = [entered.name, _few(entered.load_seconds), _few(entered.start_seconds)]
        row.append(str(max(entered.peak_mib, default=0)) if entered.peak_mib else "-")
        first = entered.cells["W1"].median("first_seconds", 1e3) if "W1" in entered.cells else None
        served = next((entered.cells[w.name] for w in workloads.values() if w.server and w.name in entered.cells), None)
        for value in (first, *((served.median(name) for name in ("ttft_ms", "itl_ms")) if served else (None, None))):
            row.append(_number(value))
        rows.append(row)
    head = ["engine", "load, s (each round)", "server to first token, s", "peak memory, MiB", "W1 first token, ms"]
    return _table([*head, "W6 TTFT mean, ms", "W6 ITL mean, ms"], rows)


def _agreement(told: Sequence[Entered]) -> str:
    named = {entered.name: entered.first_tokens for entered in told if entered.first_tokens}
    against = next((name for name in ("transformers-bf16", "quire-bf16") if name in named), next(iter(named)))
    rows = [[name, f"{_common(tokens, named[against])} of {len(named[against])}"] for name, tokens in named.items()]
    head = ["engine", f"greedy tokens of one prompt before it parts from {against}"]
    remark = "\nRandom weights give near-ties, at which bfloat16 kernels part; the first tokens should agree.\n"
    return _table(head, rows) + remark


def _common(ours: list[int], theirs: list[int]) -> int:
    count = 0
    for one, other in zip(ours, theirs, strict=False):
        if one != other:
            break
        count += 1
    return count


def _problems(told: Sequence[Entered]) -> str:
    lines = []
    for entered in told:
        if not entered.installed:
            lines.append(f"- {entered.name}: not installed\n")
            continue
        words: dict[str, list[str]] = {}
        for name, cell in entered.cells.items():
            if cell.problem:
                words.setdefault(cell.problem, []).append(name)
        lines += [f"- {entered.name} {', '.join(names)}: {problem}\n" for problem, names in words.items()]
    return "".join(lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(word).replace("|", "/") for word in line) + " |\n" for line in lines)


def _number(value: float | None, unit: float = 1.0) -> str:
    if value is None:
        return "-"
    value /= unit
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _few(values: Sequence[float]) -> str:
    return " ".join(f"{value:.1f}" for value in values) or "-"
