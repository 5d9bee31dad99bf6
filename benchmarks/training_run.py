"""One contestant of the training benchmark in a process of its own: Quire. Prints its numbers as one line of JSON."""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import time
from dataclasses import replace
from pathlib import Path

# Before torch, whose threads it tells to sleep when they have nothing to do.
import quire  # noqa: F401  # isort: skip
import torch

from benchmarks.training import TEMPLATE
from quire.lora.slots import Slots
from quire.train import door
from quire.train.config import TrainingConfig
from quire.train.estimate import flops
from quire.train.run import TrainingRun
from quire.train.together import pieces_together


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--together", type=int, default=0)
    parser.add_argument("--profile", action="store_true", help="print where the last step's time went")
    options = parser.parse_args()
    config = TrainingConfig(max_steps=options.warmup + options.steps, per_device_train_batch_size=options.batch)
    prepared = door.prepare(options.model, options.data, chat_template=TEMPLATE, config=config)
    from quire.assemble import assemble

    slots = Slots(assemble(prepared.folder, prepared.shape.for_length(prepared.longest), prepared.dtype))

    def begin(seed: int) -> TrainingRun:
        return TrainingRun(slots.model, slots, replace(config, seed=seed), prepared.training.examples)

    if options.together:
        numbers = together([begin(seed) for seed in range(options.together)], options.warmup)
    else:
        numbers = alone(begin(0), options.warmup, profile=options.profile)
    numbers["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    print(json.dumps(numbers))


def alone(run: TrainingRun, warmup: int, *, profile: bool = False) -> dict[str, object]:
    """Whole steps, everything between them included."""
    ends, tokens, learned, losses = [time.perf_counter()], [], [], []
    profiler = None
    for report in run.pieces():
        if report is None:
            continue
        ends.append(time.perf_counter())
        tokens.append(report.tokens)
        learned.append(report.supervised_tokens)
        losses.append(round(report.loss, 4))
        if profile and report.step == report.total_steps - 1:
            profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            profiler.__enter__()
    if profiler is not None:
        profiler.__exit__(None, None, None)
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))
    steps = range(warmup, len(tokens))
    lengths = [len(run.training[row].tokens) for step in steps for row in run.order.step(step)]
    seconds, count = ends[-1] - ends[warmup], sum(tokens[warmup:])
    return {
        "tokens_per_second": round(count / seconds, 1),
        "learned_tokens_per_second": round(sum(learned[warmup:]) / seconds, 1),
        "seconds": round(seconds, 3),
        "step_seconds": [round(end - begin, 3) for begin, end in itertools.pairwise(ends)],
        "tokens": count,
        "flops": flops(run.model, len(run.flat), lengths, count, sum(learned[warmup:])),
        "losses": losses,
    }


def together(runs: list[TrainingRun], warmup: int) -> dict[str, object]:
    """All in common batches, and then each by itself."""
    begin, tokens, learned, lengths = time.perf_counter(), 0, 0, []
    for report in pieces_together(runs):
        if report is None:
            continue
        if report.step == warmup and all(run.step >= warmup for run in runs):
            begin, tokens, learned, lengths = time.perf_counter(), 0, 0, []
        elif all(run.step >= warmup for run in runs):
            tokens, learned = tokens + report.tokens, learned + report.supervised_tokens
            lengths += [len(report.run.training[row].tokens) for row in report.run.order.step(report.step - 1)]
    seconds = time.perf_counter() - begin
    counted = flops(runs[0].model, len(runs[0].flat), lengths, tokens, learned)
    single = []
    for run in runs:
        again = TrainingRun(run.model, run.slots, run.config, run.training)
        run.close()
        single.append(alone(again, warmup)["tokens_per_second"])
        again.close()
    rate = tokens / seconds
    mean = len(single) / sum(1 / one for one in single)
    return {
        "tokens_per_second": round(rate, 1),
        "learned_tokens_per_second": round(learned / seconds, 1),
        "seconds": round(seconds, 3),
        "tokens": tokens,
        "flops": counted,
        "alone_tokens_per_second": single,
        "gain": round(rate / mean, 3),
    }


if __name__ == "__main__":
    main()
