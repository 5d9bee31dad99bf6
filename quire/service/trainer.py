"""Takes jobs from their files to served models: validates, queues, trains in the engine's gaps, keeps, proves and publishes.

Three threads share the work: the engine's runs pieces (driver.py); one of ours reads files and starts runs; another writes
down what steps report, makes checkpoints and ends jobs. A run belongs to the engine's thread while the driver has it and to
ours while it is held. All that must survive is in the store before anybody is told of it.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from quire.errors import AdapterError, ConfigError, EngineDead, NotFound, QuireError
from quire.log import logger
from quire.lora.parts import Adapter
from quire.service import parity, results, samples
from quire.service.driver import Driver
from quire.service.files import Files
from quire.service.gaps import Gaps
from quire.service.job_data import JobData, JobFailed, parity_rows, read_job
from quire.service.jobs import Event, Job, Jobs, NewModel
from quire.service.room import check_room
from quire.service.shelf import Shelf
from quire.service.stamp import Stamp
from quire.service.store import now
from quire.train.report import StepReport
from quire.train.run import TrainingRun

log = logger(__name__)

LOOK_SECONDS = 1.0
"""How often waiting jobs are looked at without a reason to: memory may have become free."""
STOP_SECONDS = 30.0
WAITING_SECONDS = 5.0
SAVE_SECONDS = 60.0
"""Time between two checkpoints that only serve to go on from."""


@dataclass
class Active:
    """A job that trains. saved_at: when its last checkpoint was made; epoch: steps in one."""

    id: str
    run: TrainingRun
    data: JobData
    epoch: int
    saved_at: float
    told_waiting: bool = False


class Trainer:
    """folder: where checkpoints (`jobs/`) and trained adapters (`adapters/`) go. shelf: the trained models."""

    def __init__(self, engine: Any, jobs: Jobs, files: Files, folder: Path, latency_budget: float, most_training: int) -> None:
        self._engine, self._jobs, self._files = engine, jobs, files
        self._work_folder = folder / "jobs"
        self._most_training = most_training
        self._stamp = Stamp.of(engine)
        self.base_digest: str = self._stamp.fields["base_digest"]
        self.shelf = Shelf(folder / "adapters", engine.adapters, jobs, self._stamp)
        self.gaps = Gaps(latency_budget)
        self._driver = Driver(self.gaps, self._report, self._holds)
        self._active: dict[str, Active] = {}
        self._by_run: dict[TrainingRun, Active] = {}
        self._news: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._look = threading.Event()
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._prepare_all, name="quire-jobs-in", daemon=True),
            threading.Thread(target=self._attend_all, name="quire-jobs-out", daemon=True),
        ]

    def start(self) -> None:
        """Serve what was trained here before, then go on with what is not finished."""
        self.shelf.open()
        for job in self._jobs.standing("running"):
            text = "The server was restarted; the job goes on from its last checkpoint"
            self._jobs.move(job.id, ("running",), "queued", events=[Event(text, level="warn")])
        self._jobs.changed = self._changed
        self._engine.set_background(self._driver.turn)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Leave all runs where they stand, each with a checkpoint."""
        self._stopping = True
        self._jobs.changed = lambda: None
        self._look.set()
        try:
            self._engine.set_background(None)
            self._engine.between_steps(self._driver.clear).result(STOP_SECONDS)
        except (EngineDead, TimeoutError):
            log.warning("training stops without a last checkpoint")
            return
        self._news.put(None)  # behind all that the steps have told
        for thread in self._threads:
            thread.join(timeout=STOP_SECONDS)
        if any(thread.is_alive() for thread in self._threads):
            return
        for active in list(self._active.values()):
            try:
                self._save(active)
            except Exception:
                log.exception("job %s: no checkpoint at the end", active.id)

    @property
    def num_active(self) -> int:
        return len(self._active)

    # -- in: from files to a run ---------------------------------------------------------------------------------------

    def _changed(self) -> None:
        """A job has another status: somebody may have to be started, somebody to be stopped."""
        self._look.set()
        self._news.put(self._stop_unwanted)

    def _prepare_all(self) -> None:
        while not self._stopping:
            try:
                self._validate_next()
                self._start_next()
                self._tell_who_waits()
            except Exception:
                if not self._stopping:
                    log.exception("the jobs' thread goes on after an error")
                    time.sleep(LOOK_SECONDS)
            self._look.wait(LOOK_SECONDS)
            self._look.clear()

    def _validate_next(self) -> None:
        for job in self._standing("validating_files"):
            if self._stopping:
                return
            try:
                data = self._read(job)
            except JobFailed as error:
                self._fail(job.id, error, ("validating_files",))
                continue
            notes = [Event(note) for note in data.notes]
            facts = {"hyperparameters": data.hyperparameters, "validated": True, "config": data.config.as_dict()}
            events = [*notes, Event("Files validated, moving job to queued state")]
            self._jobs.move(job.id, ("validating_files",), "queued", facts, events)

    def _standing(self, status: str) -> list[Job]:
        """The jobs that wait with that status for this base; those of another base wait for it."""
        return [job for job in self._jobs.standing(status) if job.facts["base"] == self.base_digest]

    def _read(self, job: Job) -> JobData:
        """A job's data; whatever goes wrong in reading is the job's end, not the thread's."""
        try:
            training = self._files.path(job.asked["training_file"])
            validation = job.asked.get("validation_file")
            return read_job(job, training, None if validation is None else self._files.path(validation), self._engine)
        except (JobFailed, EngineDead):
            raise
        except NotFound as error:
            raise JobFailed(f"The job failed: {error.message}.", "file_not_found", "training_file") from None
        except Exception as error:
            log.exception("job %s: its files cannot be read", job.id)
            raise JobFailed(f"The job failed while reading its files: {type(error).__name__}.", "server_error", None) from None

    def _start_next(self) -> None:
        for job in self._standing("queued"):
            if self._stopping or len(self._active) >= self._most_training:
                return
            if job.id in self._active:
                continue  # still being stopped
            try:
                if not self._begin(job):
                    return
            except JobFailed as error:
                self._fail(job.id, error, ("queued",))
            except (EngineDead, CancelledError):
                return
            except Exception as error:
                log.exception("job %s cannot be started", job.id)
                failed = JobFailed(f"The job could not be started: {type(error).__name__}.", "server_error", None)
                self._fail(job.id, failed, ("queued",))

    def _begin(self, job: Job) -> bool:
        """Start or resume a job; False if there is no room for it now."""
        data = self._read(job)
        waiting = check_room(self._engine, data)
        if waiting is not None:
            if waiting != job.facts.get("waits"):
                self._jobs.move(job.id, ("queued",), None, {"waits": waiting}, [Event(waiting, level="warn")])
            return False
        _warm_up()
        run = self._on_engine(lambda: self._run_of(job, data))
        active = Active(job.id, run, data, run.order.steps_per_epoch, time.monotonic())
        text = "Fine-tuning job started" if not run.step else f"Fine-tuning job goes on after step {run.step}"
        if not self._jobs.move(job.id, ("queued",), "running", {"waits": None}, [Event(text)]):
            self._on_engine(run.close)
            return True
        self._active[job.id] = self._by_run[run] = active
        if run.finished:
            self._news.put(lambda: self._attend(active, None, True))
        else:
            self._on_engine(lambda: self._driver.add(run))
            self._engine.wake()
        return True

    def _tell_who_waits(self) -> None:
        """Once for each job: requests leave training no time, and what would."""
        if self.gaps.waited < WAITING_SECONDS:
            return
        for active in list(self._active.values()):
            if not active.told_waiting:
                active.told_waiting = True
                text = (
                    f"Training waits for moments without requests: a piece of it takes {self.gaps.typical * 1000:.0f} ms, and "
                    f"--training-latency-budget allows {self.gaps.budget * 1000:.0f} ms. A smaller lora.micro_batch_tokens, or "
                    "a larger budget, lets it go on."
                )
                self._jobs.tell(active.id, Event(text, level="warn"))

    def _run_of(self, job: Job, data: JobData) -> TrainingRun:
        try:
            run = TrainingRun.resume(
                self._engine.slots.model,
                self._engine.slots,
                data.config,
                data.training.examples,
                () if data.validation is None else data.validation.examples,
                self._work_folder / job.id,
                stamp=self._stamp.fields,
                base_name=self._stamp.base_name,
            )
            run.directory = (
                None  # files are written by our thread, while the run is held: the engine's must not wait for a disk
            )
            return run
        except (ConfigError, AdapterError) as error:
            message = str(error).replace(f"{self._work_folder}/", "")
            raise JobFailed(message, "invalid_hyperparameters", "lora") from None
        except (MemoryError, RuntimeError) as error:
            raise JobFailed(f"The job could not be started: {error}", "server_error", None) from None

    # -- out: what steps report ----------------------------------------------------------------------------------------

    def _holds(self, report: StepReport) -> bool:
        """Whether the run must stand still after this step: to be saved, published or asked for samples."""
        active = self._by_run[report.run]
        return self._save_due(active, report) or samples.due(active.data.config, report)

    def _save_due(self, active: Active, report: StepReport) -> bool:
        return self._publish_due(active, report) or time.monotonic() - active.saved_at >= SAVE_SECONDS

    def _publish_due(self, active: Active, report: StepReport) -> bool:
        """Each epoch makes a model that is served, or each `save_steps`; the last step makes the job's own."""
        every = active.data.config.save_steps or active.epoch
        return report.step % every == 0 and report.step < report.total_steps

    def _report(self, run: TrainingRun, report: StepReport | BaseException, held: bool) -> None:
        """Called on the engine's thread: nothing here may wait."""
        active = self._by_run[run]
        if isinstance(report, StepReport):
            self._news.put(lambda: self._attend(active, report, held))
        else:
            self._news.put(lambda: self._broken(active, report))

    def _attend_all(self) -> None:
        while (news := self._news.get()) is not None:
            try:
                news()
            except (EngineDead, CancelledError):
                log.debug("news while stopping")
            except Exception:
                log.exception("the jobs' thread goes on after an error")

    def _attend(self, active: Active, report: StepReport | None, held: bool) -> None:
        """Write down a step, and if the run is held do what it is held for. None: a job that was found trained to its end."""
        if self._active.get(active.id) is not active:
            return  # stopped meanwhile
        try:
            if report is not None:
                self._tell_step(active, report)
            if not held or self._stopping or self._jobs.find(active.id).status != "running":
                return  # what stops it follows
            if report is not None:
                self._do_what_is_due(active, report)
            if active.run.finished:
                self._finish(active)
            else:
                self._on_engine(lambda: self._driver.add(active.run))
                self._engine.wake()
        except (EngineDead, CancelledError):
            raise
        except Exception as error:
            self._broken(active, error)

    def _do_what_is_due(self, active: Active, report: StepReport) -> None:
        self._save(active)
        if self._publish_due(active, report) and not report.run.finished:
            self._publish_checkpoint(active, report)
        if samples.due(active.data.config, report):
            self._sample(active, report.step)

    def _tell_step(self, active: Active, report: StepReport) -> None:
        left = (report.total_steps - report.step) * report.seconds
        facts = {"estimated_finish": now() + round(left), "step": report.step}
        self._jobs.move(active.id, ("running", "paused", "queued"), None, facts, [results.step_event(report)])

    def _save(self, active: Active) -> None:
        """A checkpoint of the step that was told last; the run must be held."""
        active.run.directory = self._work_folder / active.id
        try:
            active.run.save()
        finally:
            active.run.directory = None
        active.saved_at = time.monotonic()

    def _publish_checkpoint(self, active: Active, report: StepReport) -> None:
        job = self._jobs.find(active.id)
        name = f"{job.model_name}:ckpt-step-{report.step}"
        folder = f"{job.id}/step-{report.step}"
        self.shelf.put(name, folder, active.run.adapter())
        metrics = results.metrics_of(report)
        model = NewModel(name, folder, report.step, {key: value for key, value in metrics.items() if key != "step"})
        event = results.checkpoint_event(report.step, name)
        if not self._jobs.move(job.id, ("running",), None, None, [event], model):
            self.shelf.take_back(name, folder)
            return
        for old in self._jobs.older_checkpoints(job.id, active.data.config.save_total_limit):
            self.shelf.remove(old)

    def _sample(self, active: Active, step: int) -> None:
        """Answers to prompts of the validation data by the adapter as it is now, through the serving engine."""
        chosen = samples.prompts(active.data)
        if not chosen:
            return
        name = f"{self._jobs.find(active.id).model_name}:sample"
        self._engine.adapters.add(name, active.run.adapter(), replace=True)
        try:
            answers = asyncio.run(samples.answers(self._engine, name, chosen))
        finally:
            self._engine.adapters.remove(name)
        self._jobs.tell(active.id, samples.event(step, answers))

    def _finish(self, active: Active) -> None:
        """Keep, serve, prove, and only then say so."""
        job = self._jobs.find(active.id)
        if job.status != "running":
            return
        adapter, folder = active.run.adapter(), f"{job.id}/final"
        self.shelf.put(job.model_name, folder, adapter)
        found = self._parity(active, adapter, job.model_name)
        steps = self._jobs.steps_told(job.id)
        result = self._files.prepare_result(job.owner, f"{job.id}-metrics.csv", results.result_csv(steps, found))
        facts = {
            "fine_tuned_model": job.model_name,
            "finished_at": now(),
            "estimated_finish": None,
            "trained_tokens": sum(step["tokens"] for step in steps),
            "result_files": [result.id],
            "parity": found,
        }
        events = [results.parity_event(found), *results.closing_events(job.model_name)]
        model = NewModel(job.model_name, folder)
        self._close(active)
        if not self._jobs.move(job.id, ("running",), "succeeded", facts, events, model, also=result.insert):
            self.shelf.take_back(job.model_name, folder)
        self._clean(job.id)

    def _parity(self, active: Active, adapter: Adapter, name: str) -> dict[str, Any]:
        examples, source = parity_rows(active.data)
        chosen = parity.chosen_rows(examples, self._engine.plan.max_model_len)
        self._engine.slots.prepare(adapter)
        future: Future[list[list[float]]] = Future()
        task = parity.training_scores(self._engine.slots, adapter, chosen)
        self._on_engine(lambda: self._driver.queue(task, future))
        self._engine.wake()
        training = future.result()
        return parity.compared(training, asyncio.run(parity.serving_scores(self._engine, name, chosen)), source)

    # -- ends ----------------------------------------------------------------------------------------------------------

    def _stop_unwanted(self) -> None:
        """Take runs from the driver whose jobs were cancelled or paused."""
        for active in list(self._active.values()):
            if self._jobs.find(active.id).status != "running":
                self._on_engine(lambda run=active.run: self._driver.drop(run))
                # What its last steps have told is in the line already and comes first.
                self._news.put(lambda active=active: self._stopped(active))
        for job in self._jobs.standing("cancelled"):
            if job.id not in self._active and (self._work_folder / job.id).exists():
                self._clean(job.id)

    def _stopped(self, active: Active) -> None:
        """A run whose job was cancelled or paused is out of the driver."""
        if self._active.get(active.id) is not active:
            return
        if self._jobs.find(active.id).status != "cancelled":
            self._save(active)
            self._close(active)
        else:
            self._close(active)
            self._clean(active.id)

    def _broken(self, active: Active, error: BaseException) -> None:
        """A job has failed by its own fault or by ours; others go on."""
        if isinstance(error, QuireError):
            failed = JobFailed(str(error), "training_failed", None)
        else:
            log.error("job %s failed", active.id, exc_info=error)
            kind = "out of memory" if isinstance(error, MemoryError) or "memory" in str(error) else type(error).__name__
            failed = JobFailed(f"The job failed: {kind}. The server's log has the details.", "server_error", None)
        self._on_engine(lambda: self._driver.drop(active.run))
        self._close(active)
        self._fail(active.id, failed, ("running",))

    def _fail(self, id: str, error: JobFailed, allowed: tuple[str, ...]) -> None:
        facts = {"error": error.as_dict(), "finished_at": now(), "estimated_finish": None}
        if self._jobs.move(id, allowed, "failed", facts, [Event(error.message, level="error", data=error.event_data())]):
            log.warning("job %s failed: %s", id, error.message[:300])
            self._clean(id)

    def _close(self, active: Active) -> None:
        """Its memory is free, its place in the queue is another's."""
        self._on_engine(active.run.close)
        self._active.pop(active.id, None)
        self._by_run.pop(active.run, None)
        self._look.set()

    def _clean(self, id: str) -> None:
        """An ended job needs neither checkpoints nor deleted files any more."""
        shutil.rmtree(self._work_folder / id, ignore_errors=True)
        self._files.sweep()

    # -- the engine ----------------------------------------------------------------------------------------------------

    def _on_engine(self, work: Callable[[], Any]) -> Any:
        """Do something between two pieces, on the thread that runs the model."""
        return self._engine.between_steps(work).result()


def _warm_up() -> None:
    """The first gradient in a process has torch import for seconds: let that be on our thread, not between two steps."""
    one = torch.ones(2, requires_grad=True)
    torch.autograd.grad(one * 2, one, torch.ones(2))
