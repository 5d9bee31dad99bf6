"""One sitting: entries take turns, round by round, each in a process of its own, with the machine's limits measured between.

Results of one engine move by a tenth between processes, so an entry is started anew in every round. Every cell has a time
limit; what was measured before it passed is kept, and the cell is left out of later rounds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engines import roofline, served
from benchmarks.engines.checkpoints import REPOSITORY, CannotMake
from benchmarks.engines.lineup import Entry, Place
from benchmarks.engines.processes import Failed, Running, TooSlow
from benchmarks.engines.record import Entered, Run
from benchmarks.engines.workloads import CHECK, FIRST_TOKEN_RUNS, IDS, Workload, check_prompt

# A run that is not counted comes first: prompts of full length, but a quarter of them, and little output.
WARM_TOKENS, WARM_SHARE = 8, 4
LOAD_SECONDS = 300.0
NOT_BUILT = "not built"


@dataclass(frozen=True)
class Plan:
    """rounds: turns of every entry. repeats: counted runs of a workload in a turn. limit: seconds of a cell in one turn."""

    rounds: int
    repeats: int
    limit: float


PLANS = {"full": Plan(rounds=2, repeats=2, limit=300.0), "quick": Plan(rounds=1, repeats=1, limit=150.0)}


class Sitting:
    """Runs everything; `told` has what was measured so far, also after an exception."""

    def __init__(
        self,
        place: Place,
        entries: list[Entry],
        workloads: dict[str, Workload],
        plan: Plan,
        logs: Path,
        *,
        ids: range = IDS,
        after_turn: Callable[[], None] = lambda: None,
        measure_limits: Callable[[], roofline.Limits] | None = None,
    ) -> None:
        self._place, self._entries, self._workloads, self._plan = place, entries, workloads, plan
        self._logs, self._ids, self._after_turn = logs, ids, after_turn
        self._measure = measure_limits or (lambda: roofline.measure(logs, place.threads))
        self.limits: list[roofline.Limits] = []
        self.told = {
            entry.name: Entered(entry.name, entry.kind, place.version(entry), place.installed(entry)) for entry in entries
        }

    def run(self) -> None:
        self._sample_limits()
        for number in range(self._plan.rounds):
            for entry in self._entries:
                self._turn(entry, number)
                self._after_turn()
            self._sample_limits()

    def _turn(self, entry: Entry, number: int) -> None:
        told = self.told[entry.name]
        wanted = tuple(name for name in entry.workloads if name in self._workloads and not told.cell(name).problem)
        if not wanted:
            return
        if not told.installed:
            told.give_up(wanted, "not installed")
            return
        try:
            for form in (entry.checkpoint, *(("adapters",) if "W5" in wanted else ())):
                self._place.work.make(form)
        except CannotMake as error:
            told.give_up(wanted, str(error))
            return
        if told.weight_bytes is None:
            told.weight_bytes = self._place.work.weight_bytes(entry.checkpoint)
        if entry.own:
            self._own(entry, number)
            return
        left = [name for name in wanted if not self._workloads[name].server]
        while left:
            left = self._offline(entry, number, left)
        for name in wanted:
            if self._workloads[name].server:
                self._served(entry, name, number)

    def _offline(self, entry: Entry, number: int, names: list[str]) -> list[str]:
        """One process through these workloads; gives those that a process that had to be ended did not come to."""
        told = self.told[entry.name]
        command = self._place.worker(entry, tuple(names))
        with Running(command, self._place.environment(entry), REPOSITORY, self._log(entry), pipes=True) as process:
            try:
                ready = process.answer(time.monotonic() + LOAD_SECONDS)
            except TooSlow:
                self._refused(entry, names, TooSlow(f"did not load within {LOAD_SECONDS:.0f} s"))
                return []
            except Failed as error:
                self._refused(entry, names, error)
                return []
            told.load_seconds.append(round(time.monotonic() - process.began, 2))
            told.weight_bytes = ready.get("weight_bytes") or told.weight_bytes
            told.about = ready.get("about") or told.about
            if not told.first_tokens:
                told.first_tokens = self._check(process)
            for place, name in enumerate(names):
                try:
                    self._cell(process, entry, self._workloads[name], number)
                except TooSlow:
                    self._say(entry, name, "ended: too slow")
                    told.give_up((name,), f"did not finish within {self._plan.limit:.0f} s")
                    process.close(0.0)
                    return names[place + 1 :]
                except Failed as error:
                    self._refused(entry, [name], error)
                    if process.process.poll() is not None:
                        return names[place + 1 :]
                told.peak_mib.append(process.peak_mib())
        return []

    def _cell(self, process: Running, entry: Entry, workload: Workload, number: int) -> None:
        deadline = time.monotonic() + self._plan.limit
        adapters = workload.adapter_numbers()

        def ask(prompts: list[list[int]], output: int, chosen: list[int] | None = None) -> float:
            answer = process.ask({"prompts": prompts, "output": output, "adapters": chosen}, deadline)
            lengths = {len(row) for row in answer["tokens"]}
            if lengths != {output} or len(answer["tokens"]) != len(prompts):
                raise Failed(f"gave {sorted(lengths)} tokens instead of {output}")
            return float(answer["seconds"])

        begin = 1 + number * (self._plan.repeats + 1)
        warm = self._warm(workload, begin)
        ask(warm, min(WARM_TOKENS, workload.output), adapters[: len(warm)] if adapters else None)
        for run in range(begin + 1, begin + 1 + self._plan.repeats):
            alone = workload.count == 1 and workload.output > 1
            first = ask(workload.prompts(run + FIRST_TOKEN_RUNS, self._ids), 1) if alone else None
            seconds = ask(workload.prompts(run, self._ids), workload.output, adapters)
            self.told[entry.name].cell(workload.name).runs.append(Run(number, seconds, workload.tokens(), first))
        self._say_rate(entry, workload)

    def _warm(self, workload: Workload, run: int) -> list[list[int]]:
        prompts = workload.prompts(run, self._ids)
        return prompts[: max(1, len(prompts) // WARM_SHARE)]

    def _served(self, entry: Entry, name: str, number: int) -> None:
        told, workload = self.told[entry.name], self._workloads[name]
        begin = 1 + number * (self._plan.repeats + 1)
        runs = range(begin + 1, begin + 1 + self._plan.repeats)
        try:
            peak = served.measure(
                lambda port: self._place.server(entry, port),
                self._place.environment(entry),
                self._log(entry),
                [self._warm(workload, begin), *(workload.prompts(run, self._ids) for run in runs)],
                workload.output,
                check_prompt(self._ids),
                warm_tokens=WARM_TOKENS,
                load_seconds=LOAD_SECONDS,
                limit=self._plan.limit,
                started=told.start_seconds.append,
                keep=lambda run: told.cell(name).runs.append(Run(number, **run)),
            )
        except (Failed, TooSlow) as error:
            self._refused(entry, [name], error)
            return
        told.peak_mib.append(peak)
        self._say_rate(entry, workload)

    def _own(self, entry: Entry, number: int) -> None:
        """The engine's own benchmark: a prompt, and output from an empty context."""
        told = self.told[entry.name]
        names = tuple(name for name in ("W1", "W2") if name in self._workloads)
        prompt, output = (self._workloads[name].tokens() if name in names else 0 for name in ("W2", "W1"))
        command = self._place.own_benchmark(entry, prompt, output, self._plan.repeats)
        try:
            with Running(command, self._place.environment(entry), REPOSITORY, self._log(entry), pipes=True) as process:
                rows = json.loads(process.whole_output(time.monotonic() + self._plan.limit))
        except (Failed, TooSlow, ValueError) as error:
            self._refused(entry, list(names), error)
            return
        for row in rows:
            name, count = ("W2", row["n_prompt"]) if row["n_prompt"] else ("W1", row["n_gen"])
            for rate in row["samples_ts"]:
                told.cell(name).runs.append(Run(number, count / rate, count))
        for name in names:
            self._say_rate(entry, self._workloads[name])

    def _check(self, process: Running) -> list[int]:
        try:
            question = {"prompts": [check_prompt(self._ids)], "output": CHECK.output}
            tokens: list[int] = process.ask(question, time.monotonic() + self._plan.limit)["tokens"][0]
            return tokens
        except (Failed, TooSlow):
            return []

    def _refused(self, entry: Entry, names: list[str], error: Exception) -> None:
        problem = str(error) or f"did not finish within {self._plan.limit:.0f} s"
        if NOT_BUILT in problem:
            problem = NOT_BUILT
        for name in names:
            self._say(entry, name, problem)
        self.told[entry.name].give_up(tuple(names), problem)

    def _sample_limits(self) -> None:
        print(f"{_clock()} measuring the machine's limits", file=sys.stderr, flush=True)
        self.limits.append(self._measure())

    def _say_rate(self, entry: Entry, workload: Workload) -> None:
        rate = self.told[entry.name].cell(workload.name).rate(workload)
        self._say(entry, workload.name, f"{rate:.1f} {workload.unit}" if rate is not None else "nothing")

    def _say(self, entry: Entry, name: str, words: str) -> None:
        print(f"{_clock()} {entry.name} {name}: {words}", file=sys.stderr, flush=True)

    def _log(self, entry: Entry) -> Path:
        return self._logs / f"{entry.name}.log"


def _clock() -> str:
    return time.strftime("%H:%M:%S")


def code_version() -> str:
    """The commit that is measured, and whether files differ from it."""
    try:
        words = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
        return subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
