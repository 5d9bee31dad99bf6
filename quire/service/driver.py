"""The engine thread's side of training: all runs in common batches, one piece at a time, and other work cut in pieces.

`turn` is the engine's background work. The list of runs changes only between two pieces, by way of `engine.between_steps`.
What a step reports, and a run that failed, is handed to `tell`; what becomes of it is the trainer's business.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from typing import Any

from quire.log import logger
from quire.service.gaps import Gaps
from quire.train.report import StepReport
from quire.train.run import TrainingRun
from quire.train.together import pieces_together

log = logger(__name__)


class Driver:
    """tell: called on the engine thread with (run, report or error, whether the run waits now to be `add`ed again). holds: says
    whether it is to wait after this report; one that has ended always does."""

    def __init__(
        self,
        gaps: Gaps,
        tell: Callable[[TrainingRun, StepReport | BaseException, bool], None],
        holds: Callable[[StepReport], bool],
    ) -> None:
        self.gaps = gaps
        self._tell, self._holds = tell, holds
        self._runs: list[TrainingRun] = []
        self._pieces: Iterator[StepReport | None] | None = None
        self._tasks: deque[tuple[Generator[None, None, Any], Future[Any]]] = deque()
        self._alone = False

    def turn(self, busy: bool) -> bool:
        """A little work; whether there is more."""
        return self._any() and self.gaps.work(self._piece, busy)

    # between two pieces, on the engine thread

    def add(self, run: TrainingRun) -> None:
        """Train this run, too."""
        self._runs.append(run)
        self._alone = False

    def drop(self, run: TrainingRun) -> None:
        """Leave a run where its last step ended. The others begin their present step anew."""
        if run in self._runs:
            self._runs.remove(run)
        self._forget_pieces()

    def queue(self, task: Generator[None, None, Any], future: Future[Any]) -> None:
        """Do other work in pieces; the future gets what the generator returns."""
        self._tasks.append((task, future))

    def clear(self) -> None:
        """Forget everything."""
        self._runs.clear()
        self._forget_pieces()
        while self._tasks:
            task, future = self._tasks.popleft()
            task.close()
            future.cancel()

    def _forget_pieces(self) -> None:
        if self._pieces is not None:
            self._pieces.close()  # type: ignore[attr-defined]
            self._pieces = None

    # one piece

    def _any(self) -> bool:
        return bool(self._tasks or self._runs)

    def _piece(self) -> bool:
        if self._tasks:
            self._task()
        elif self._runs:
            self._train()
        return self._any()

    def _task(self) -> None:
        task, future = self._tasks[0]
        try:
            next(task)
        except StopIteration as ended:
            self._tasks.popleft()
            future.set_result(ended.value)
        except Exception as error:
            self._tasks.popleft()
            future.set_exception(error)

    def _train(self) -> None:
        chosen = self._runs[:1] if self._alone else self._runs
        if self._pieces is None:
            self._pieces = pieces_together(chosen)
        try:
            report = next(self._pieces)
        except StopIteration:
            self._pieces = None
            for run in [run for run in self._runs if run.finished]:
                self._runs.remove(run)
        except Exception as error:
            self._failed(chosen, error)
        else:
            if report is not None:
                self._reported(report)

    def _reported(self, report: StepReport) -> None:
        if self._alone:  # whose step has ended goes to the end of the line
            self._runs.append(self._runs.pop(0))
            self._forget_pieces()
        held = report.run.finished or self._holds(report)
        if held:
            self._runs.remove(report.run)
            if not self._runs:
                self._forget_pieces()
        self._tell(report.run, report, held)

    def _failed(self, chosen: list[TrainingRun], error: Exception) -> None:
        """One run alone is at fault; of several it is not known which, so they go on one by one until it shows."""
        self._pieces = None
        if len(chosen) > 1:
            log.warning("a step of %d runs failed (%s); they go on one by one", len(chosen), error)
            self._alone = True
            return
        run = chosen[0]
        self._runs.remove(run)
        self._tell(run, error, True)
