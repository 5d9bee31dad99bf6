"""`python -m benchmarks.engines`: run a sitting and write its JSON and its page under `benchmarks/results`.

    python -m benchmarks.engines --peers DIR                 # everything, two rounds
    python -m benchmarks.engines --peers DIR --plan quick    # one round
    python -m benchmarks.engines --peers DIR --prepare       # only make the model in all forms
    python -m benchmarks.engines --peers DIR --check         # only see whether every engine starts and answers

Ctrl-C ends the engine that is running and writes what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.engines import page, roofline
from benchmarks.engines.check import check
from benchmarks.engines.checkpoints import CannotMake, Work
from benchmarks.engines.lineup import Entry, Place, entries
from benchmarks.engines.processes import OneInterruption
from benchmarks.engines.sitting import PLANS, Sitting, code_version
from benchmarks.engines.workloads import WORKLOADS
from benchmarks.random_model import SHAPES
from quire import envs
from quire.plan.hardware import probe

RESULTS = Path(__file__).parents[1] / "results"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__.splitlines()[0])
    made.add_argument("--peers", type=Path, help="folder that `python -m benchmarks.peers install` made")
    made.add_argument("--work", type=Path, help="folder for models, kept for the next time [PEERS/work, or Quire's cache]")
    made.add_argument("--shape", choices=list(SHAPES), default="0.5b", help="shape of the model [0.5b]")
    made.add_argument("--plan", choices=list(PLANS), default="full", help="how often everything is measured [full]")
    made.add_argument("--engines", help="only those whose names begin so, with commas: quire,vllm-bf16")
    made.add_argument("--workloads", help="only these, with commas: W1,W3")
    made.add_argument("--rounds", type=int, help="turns of every engine, instead of the plan's")
    made.add_argument("--repeats", type=int, help="counted runs in a turn, instead of the plan's")
    made.add_argument("--limit", type=float, help="seconds of a cell in a turn, instead of the plan's")
    made.add_argument("--threads", type=int, help="threads of every engine [all usable cores]")
    made.add_argument("--quire", metavar="JSON", default="{}", help='further options of Quire\'s engine: {"block_size": 32}')
    made.add_argument("--no-limits", action="store_true", help="do not measure the machine's limits, for a quick look")
    made.add_argument("--prepare", action="store_true", help="make the models and stop")
    made.add_argument("--check", action="store_true", help="only see whether every engine starts and answers")
    made.add_argument("--output", type=Path, default=RESULTS, help="folder of the results [benchmarks/results]")
    return made


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    given = {name: getattr(options, name) for name in ("rounds", "repeats", "limit") if getattr(options, name) is not None}
    for name, value in given.items():
        if not value > 0:
            parser().error(f"--{name} must be above 0, got {value}")
    plan = replace(PLANS[options.plan], **given)
    workloads = _chosen("--workloads", options.workloads, WORKLOADS)
    folder = options.peers.resolve() if options.peers else None
    if folder is not None and not folder.is_dir():
        parser().error(f"--peers {options.peers} is no folder: make it with python -m benchmarks.peers install --into DIR")
    models = options.work or (folder / "work" if folder else envs.cache_dir() / "benchmarks")
    work = Work(models.resolve(), options.shape, folder)
    place = Place(work, folder, options.threads or probe().cores, _object(options.quire))
    entered = [entry for entry in entries() if _wanted(entry, options.engines) and set(entry.workloads) & set(workloads)]
    if not entered:
        parser().error(f"--engines {options.engines} names none of: {', '.join(entry.name for entry in entries())}")
    if options.prepare:
        return _prepare(place, entered)
    logs = work.path("logs")
    logs.mkdir(exist_ok=True)
    if options.check:
        return 0 if check(place, entered, logs) else 1
    now = datetime.now(UTC)
    path = options.output / f"{now:%Y-%m-%d-%H%M}-engines-{options.shape}"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {**_facts(place, options.shape), "time": f"{now:%Y-%m-%d %H:%M}Z", **vars(plan), "options": place.plain}
    sitting = Sitting(
        place,
        entered,
        workloads,
        plan,
        logs,
        after_turn=lambda: _write(path, facts, sitting, workloads),
        measure_limits=(lambda: roofline.Limits("", problem="not asked for")) if options.no_limits else None,
    )
    return _sit(sitting, lambda: _write(path, facts, sitting, workloads), facts, path)


def _sit(sitting: Sitting, write: Any, facts: dict[str, Any], path: Path) -> int:
    """Run it; whatever ends it, what was measured is written."""
    interruption = OneInterruption()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interruption)
    begin, code = time.monotonic(), 0
    try:
        sitting.run()
    except KeyboardInterrupt:
        facts["broken_off"], code = True, 130
        print("broken off; writing what was measured", file=sys.stderr)
    finally:
        facts["minutes"] = round((time.monotonic() - begin) / 60, 1)
        write()
    if path.parent == RESULTS:
        rows = json.loads(path.with_name(path.name + ".json").read_text())["summary"]
        with (RESULTS.parent / "README.md").open("a") as file:
            line = f"{facts['shape']}, Quire (against the best peer, of the machine's limit): {page.headline(rows)}"
            file.write(f"| {facts['time'][:10]} | engines | {line} | [{path.name}.md](results/{path.name}.md) |\n")
    print(path.with_name(path.name + ".md").read_text())
    print(f"written to {path.name}.json and {path.name}.md in {path.parent.name}/", file=sys.stderr)
    return code


def _write(path: Path, facts: dict[str, Any], sitting: Sitting, workloads: dict[str, Any]) -> None:
    told, shape = list(sitting.told.values()), SHAPES[facts["shape"]]
    result = {
        **facts,
        "limits": [limits.as_dict() for limits in sitting.limits],
        "summary": page.summary(told, workloads, shape, roofline.Best(tuple(sitting.limits))),
        "engines": [entered.as_dict(workloads) for entered in told],
    }
    shown = page.page(facts, told, workloads, shape, sitting.limits)
    for suffix, text in ((".json", json.dumps(result, indent=1) + "\n"), (".md", shown)):
        part = path.with_name(path.name + ".part")
        part.write_text(text, encoding="utf-8")
        part.rename(path.with_name(path.name + suffix))


def _prepare(place: Place, entered: list[Entry]) -> int:
    failed = False
    for entry in entered:
        for form in (entry.checkpoint, "adapters"):
            if place.installed(entry):
                try:
                    place.work.make(form)
                except CannotMake as error:
                    failed = True
                    print(f"{entry.name}: {error}", file=sys.stderr)
    return 1 if failed else 0


def _facts(place: Place, shape: str) -> dict[str, Any]:
    """The machine's kind, never its name."""
    model = "unknown"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "shape": shape,
        "processor": model,
        "flags": roofline.flags(),
        "threads": place.threads,
        "memory_gib": round(probe().memory_total / (1 << 30)),
        "huge_pages": pages.read_text().partition("[")[2].partition("]")[0] if pages.exists() else "unknown",
        "load_average": round(os.getloadavg()[0], 2),
        "code": code_version(),
        "ops": envs.ops(),
    }


def _chosen(flag: str, text: str | None, known: dict[str, Any]) -> dict[str, Any]:
    names = text.split(",") if text else list(known)
    for name in names:
        if name not in known:
            parser().error(f"{flag} must be among {', '.join(known)}, got {name!r}")
    return {name: known[name] for name in known if name in names}


def _wanted(entry: Entry, text: str | None) -> bool:
    return text is None or any(entry.name.startswith(prefix) for prefix in text.split(","))


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        parser().error(f"--quire must be a JSON object, got {text!r}")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
