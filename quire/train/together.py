"""Several runs in one packed batch: the base's products are made once for the rows of all, each row through its own slot.

A run's shares are cut as they would be if it were alone, and its gradients are sums over its own rows only, so it learns
what it would learn alone. Runs may differ in everything. Knows no optimizer and no file.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from quire.train.memory import recomputed_layers
from quire.train.passes import Share, learn, score
from quire.train.report import StepReport
from quire.train.run import TrainingRun


def pieces_together(runs: Sequence[TrainingRun]) -> Iterator[StepReport | None]:
    """Trains all to their ends: None after each piece of work, each run's StepReport (`report.run`) after each of its steps.

    All runs must be of one model. `runs` may change between two pieces: who is added begins with the next batch, who is
    removed is left where its last step ended.
    """
    working: dict[TrainingRun, Iterator[Share | StepReport]] = {}
    waiting: dict[TrainingRun, Share] = {}
    while True:
        for gone in [run for run in working if run not in runs]:
            working.pop(gone).close()
            waiting.pop(gone, None)
        for run in runs:
            if run not in working and not run.finished:
                working[run] = run.work()
        for run in [run for run in working if run not in waiting]:
            yield from _ask(run, working, waiting)
        if not waiting:
            return
        group = _group(waiting)
        yield from _compute(group)
        for run in group:
            waiting.pop(run, None)


def _ask(
    run: TrainingRun, working: dict[TrainingRun, Iterator[Share | StepReport]], waiting: dict[TrainingRun, Share]
) -> Iterator[StepReport]:
    """Go on with a run until it wants its next share, or has ended."""
    for wanted in working[run]:
        if isinstance(wanted, Share):
            waiting[run] = wanted
            return
        yield wanted
        if run not in working:
            return
    del working[run]


def _group(waiting: dict[TrainingRun, Share]) -> dict[TrainingRun, Share]:
    """Those whose shares go through the model at once: of one direction, with no more tokens than one run may have."""
    first = next(iter(waiting.values()))
    room = max(run.config.micro_batch_tokens for run in waiting)
    group: dict[TrainingRun, Share] = {}
    for run, share in waiting.items():
        alike = (share.weigh is None) == (first.weigh is None)
        if alike and (not group or share.tokens <= room):
            group[run] = share
            room -= share.tokens
    return group


def _compute(group: dict[TrainingRun, Share]) -> Iterator[None]:
    shares = list(group.values())
    model = next(iter(group)).model
    if shares[0].weigh is None:
        work = score(model, shares)
    else:
        work = learn(model, shares, recomputed_layers(model, group, sum(share.tokens for share in shares)))
    while True:
        begin = time.monotonic()
        try:
            next(work)
        except StopIteration:
            return
        finally:
            for run in group:
                run.busy_seconds += time.monotonic() - begin
        yield
