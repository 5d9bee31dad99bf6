"""Does every engine start and answer? One short prompt each, through its process and, where it has one, through its server."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.engines import served
from benchmarks.engines.checkpoints import REPOSITORY, CannotMake
from benchmarks.engines.lineup import Entry, Place
from benchmarks.engines.processes import Failed, Running, TooSlow
from benchmarks.engines.workloads import CHECK, WORKLOADS, check_prompt

LOAD_SECONDS, ANSWER_SECONDS = 600.0, 120.0


def check(place: Place, entries: list[Entry], logs: Path) -> bool:
    """Print a line for each; whether all that are installed answered."""
    well = True
    for entry in entries:
        if not place.installed(entry):
            print(f"{entry.name:20} not installed", flush=True)
            continue
        try:
            for words in _answers(place, entry, logs / f"{entry.name}.log"):
                print(f"{entry.name:20} {words}", flush=True)
        except (CannotMake, Failed, TooSlow) as error:
            well = False
            print(f"{entry.name:20} FAILS: {error or 'too slow'}", flush=True)
    return well


def _answers(place: Place, entry: Entry, log: Path) -> Iterator[str]:
    place.work.make(entry.checkpoint)
    if "W5" in entry.workloads:
        place.work.make("adapters")
    if entry.own:
        command = place.own_benchmark(entry, 8, 4, 1)
        with Running(command, place.environment(entry), REPOSITORY, log, pipes=True) as process:
            yield f"{len(process.whole_output(time.monotonic() + ANSWER_SECONDS))} characters of results"
        return
    with Running(place.worker(entry, ("W1",)), place.environment(entry), REPOSITORY, log, pipes=True) as process:
        about = process.answer(time.monotonic() + LOAD_SECONDS).get("about") or ""
        loaded = time.monotonic() - process.began
        question = {"prompts": [check_prompt()], "output": CHECK.output}
        tokens = process.ask(question, time.monotonic() + ANSWER_SECONDS)["tokens"][0]
        yield f"{about}: loads in {loaded:.1f} s, {process.peak_mib()} MiB, tokens {tokens[:6]} ..."
    if any(WORKLOADS[name].server for name in entry.workloads):
        starts: list[float] = []
        served.measure(
            lambda port: place.server(entry, port),
            place.environment(entry),
            log,
            [[check_prompt()]],
            CHECK.output,
            check_prompt(),
            warm_tokens=CHECK.output,
            load_seconds=LOAD_SECONDS,
            limit=ANSWER_SECONDS,
            started=starts.append,
            keep=lambda run: print(run, file=sys.stderr),
        )
        yield f"server: first token after {starts[0]:.1f} s"
