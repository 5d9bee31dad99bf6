"""What do planning a step, taking in its tokens and building its batch cost at 256 running sequences?

The model is left out. The limit is our own: one millisecond a step for `schedule` and `update` together. Medians stand other
load on the machine, the 99th percentile does not: see the load average that is recorded beside it.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from benchmarks.record import Outcome
from quire.batch import KVCache
from quire.engine.builder import build
from quire.request import EngineRequest, SamplingParams
from quire.scheduler.blocks import BlockPool
from quire.scheduler.limits import Limits
from quire.scheduler.prefix import root_key
from quire.scheduler.scheduler import Scheduler
from quire.speculation import Speculation

BLOCK_SIZE = 16
LIMIT_MS = 1.0
DRAFTS = Speculation(num_speculative_tokens=4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sequences", type=int, default=256, help="running sequences")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 4096, 16384], help="context lengths")
    parser.add_argument("--steps", type=int, default=400, help="decoding steps timed for each")


@dataclass
class Times:
    """Seconds of each part, step by step."""

    schedule: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)
    build: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, dict[str, float]]:
        own = [plan + take for plan, take in zip(self.schedule, self.update, strict=True)]
        parts = {"schedule": self.schedule, "update": self.update, "schedule_and_update": own, "build": self.build}
        return {
            name: {
                "median_ms": round(1e3 * float(np.median(values)), 3),
                "p99_ms": round(1e3 * float(np.percentile(values, 99)), 3),
            }
            for name, values in parts.items()
        }


def run(options: argparse.Namespace) -> Outcome:
    cases = []
    for prefix_caching, speculation in ((True, None), (False, None), (True, DRAFTS)):
        for context in options.contexts:
            times = _decode(options.sequences, context, options.steps, prefix_caching, speculation)
            setting = {"context": context, "prefix_caching": prefix_caching, "speculation": speculation is not None}
            cases.append({**setting, **times.summary()})
    own = [case["schedule_and_update"]["median_ms"] for case in cases]
    built = [case["build"]["median_ms"] for case in cases]
    headline = (
        f"{options.sequences} sequences decoding: scheduler {min(own):.2f}-{max(own):.2f} ms a step, at worst "
        f"{100 * max(own) / LIMIT_MS:.0f} % of its limit of {LIMIT_MS:g} ms; batch {min(built):.2f}-{max(built):.2f} ms"
    )
    return Outcome(headline, {"cases": cases})


def _decode(sequences: int, context: int, steps: int, prefix_caching: bool, speculation: Speculation | None) -> Times:
    """Compute all prompts, then time `steps` steps in which every sequence grows by a token; no draft ever comes true."""
    length = context + steps + 2
    pool = BlockPool(sequences * (length // BLOCK_SIZE + 1))
    limits = Limits(sequences, 1 << 20, length, BLOCK_SIZE, prefix_caching=prefix_caching, speculation=speculation)
    scheduler = Scheduler(limits, pool, lambda request: root_key("benchmark"))
    for number in range(sequences):
        # Lengths differ a little, so that not all sequences need their next block in the same step.
        prompt = tuple(range(number, number + context - number % BLOCK_SIZE))
        scheduler.add(EngineRequest(str(number), prompt, SamplingParams(max_tokens=steps + 2), 0.0))
    while scheduler.backlog():
        step = scheduler.schedule()
        drawn = {number: [1] for chunk in step.chunks for number in chunk.draws}
        scheduler.update(step, drawn)
        if len(drawn) == sequences:
            break
    # A cache of no layers' worth of numbers: the builder asks for nothing but the block size.
    kv = KVCache([torch.empty(1, BLOCK_SIZE, 1, 1)], [torch.empty(1, BLOCK_SIZE, 1, 1)])
    times, clock = Times(), time.perf_counter
    for token in range(steps):
        begin = clock()
        step = scheduler.schedule()
        planned = clock()
        assert len(step.chunks) == sequences
        build(step, kv, {})
        built = clock()
        drawn = {number: [token] for chunk in step.chunks for number in chunk.draws}
        before = clock()
        scheduler.update(step, drawn)
        times.update.append(clock() - before)
        times.schedule.append(planned - begin)
        times.build.append(built - planned)
    return times
