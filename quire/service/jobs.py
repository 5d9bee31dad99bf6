"""The record of fine-tuning jobs: what was asked, where each stands, what happened. A state machine over the store.

    validating_files -> queued -> running -> succeeded | failed | cancelled        (paused: from any of the first three)

Every change is one transaction with its events, so that no reader sees a status without the event that explains it. Knows
nothing of how a job is trained.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quire.errors import InvalidRequest, NotFound, TooManyRequests
from quire.service.files import RESULTS, FileRecord, Files, Page, new_id, page_of
from quire.service.job_request import JobRequest
from quire.service.store import Store, now

ACTIVE = ("validating_files", "queued", "running")
UNFINISHED = (*ACTIVE, "paused")
ENDED = ("succeeded", "failed", "cancelled")
ORGANIZATION = "quire"


@dataclass(frozen=True)
class Job:
    """One job. asked: the request; facts: what became known since (resolved hyperparameters, results, errors, ...)."""

    number: int
    id: str
    owner: str
    status: str
    created_at: int
    metadata: dict[str, str] | None
    asked: dict[str, Any]
    facts: dict[str, Any]

    @property
    def model_name(self) -> str:
        """What the trained model will be called."""
        return self.facts["name"]


@dataclass(frozen=True)
class Event:
    """Something that is to be told of a job. `step`: told at most once for each step."""

    message: str
    level: str = "info"
    data: Mapping[str, Any] | None = None
    step: int | None = None

    @property
    def type(self) -> str:
        return "message" if self.step is None else "metrics"


@dataclass(frozen=True)
class NewModel:
    """A model that a job has made, to be recorded together with the event that tells of it. step: of a checkpoint."""

    name: str
    folder: str
    step: int | None = None
    metrics: Mapping[str, Any] | None = None


class Jobs:
    """All jobs of one store. `changed` is called after every change, from whichever thread made it."""

    def __init__(self, store: Store, files: Files, most_unfinished: int, clock: Callable[[], int] = now) -> None:
        self._store, self._files, self._clock = store, files, clock
        self._most_unfinished = most_unfinished
        self.changed: Callable[[], None] = lambda: None

    # clients

    def create(self, owner: str, request: JobRequest, base: str, base_digest: str) -> Job:
        """A new job; when this returns, it is on the disk. `base`: the base model's part of the new model's name."""
        for place in ("training_file", "validation_file"):
            id = getattr(request, place)
            if id is not None:
                self._check_file(owner, id, place)
        job_id = new_id("ftjob-")
        name = f"ft:{base}:{ORGANIZATION}:{request.suffix or ''}:{new_id('', 8)}"
        events = ["Created fine-tuning job: " + job_id, "Validating training file: " + request.training_file]
        if request.validation_file is not None:
            events[1] += f" and validation file: {request.validation_file}"
        created = self._clock()
        metadata = None if request.metadata is None else json.dumps(dict(request.metadata))
        facts = {"name": name, "base": base_digest, "seed": request.seed if request.seed is not None else int(new_seed(job_id))}
        row = (job_id, owner, "validating_files", created, metadata, json.dumps(request.plain()), json.dumps(facts))

        def insert(connection: sqlite3.Connection) -> None:
            query = f"SELECT count(*) FROM jobs WHERE owner = ? AND status IN {UNFINISHED}"
            (unfinished,) = connection.execute(query, (owner,)).fetchone()
            if unfinished >= self._most_unfinished:
                raise TooManyRequests(
                    f"{unfinished} jobs are not finished, which is the limit: wait for one to end or cancel one.",
                    retry_after=60.0,
                )
            columns = "id, owner, status, created_at, metadata, asked, facts"
            connection.execute(f"INSERT INTO jobs ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            self._record(connection, job_id, [Event(text) for text in events])

        self._store.write(insert)
        self.changed()
        return self.get(owner, job_id)

    def _check_file(self, owner: str, id: str, place: str) -> None:
        try:
            record: FileRecord = self._files.get(owner, id)
        except NotFound:
            raise InvalidRequest(f"invalid {place}: {id[:100]}. No such File object.", parameter=place) from None
        if record.purpose not in ("fine-tune", RESULTS):
            raise InvalidRequest(
                f"invalid {place}: {id} has the purpose {record.purpose!r}; it must be uploaded with 'fine-tune'.",
                parameter=place,
            )

    def get(self, owner: str, id: str) -> Job:
        """One job, or NotFound."""
        rows = self._store.read("SELECT * FROM jobs WHERE id = ? AND owner = ?", (id, owner))
        if not rows:
            message = f"Could not find fine tune: {id[:100]}"
            raise NotFound(message, parameter="fine_tune_id", code="fine_tune_not_found")
        return _job(rows[0])

    def page(self, owner: str, *, after: str | None, limit: int, metadata: Mapping[str, str] | None, bare: bool) -> Page:
        """Jobs, newest first. metadata: pairs that they must have; bare: those without any."""
        where, values = "owner = ?", [owner]
        if bare:
            where += " AND metadata IS NULL"
        for key, value in (metadata or {}).items():
            where += " AND EXISTS (SELECT 1 FROM json_each(jobs.metadata) WHERE json_each.key = ? AND json_each.value = ?)"
            values += [key, value]
        page = page_of(self._store, "jobs", where, values, after, limit, within=("owner", owner))
        return Page([_job(row) for row in page.items], page.has_more)

    def events(self, job: Job, *, after: str | None, limit: int) -> Page:
        """What happened, newest first: rows of the table."""
        return page_of(self._store, "events", "job = ?", [job.id], after, limit, within=("job", job.id))

    def checkpoints(self, job: Job, *, after: str | None, limit: int) -> Page:
        """Models made on the way, newest first: rows of the table."""
        return page_of(self._store, "checkpoints", "job = ?", [job.id], after, limit, within=("job", job.id))

    def cancel(self, owner: str, id: str) -> Job:
        """End a job for good."""
        return self._ask(owner, id, UNFINISHED, "cancelled", "cancelled", {"finished_at": self._clock()})

    def pause(self, owner: str, id: str) -> Job:
        """Stop a job so that it can go on later."""
        return self._ask(owner, id, ACTIVE, "paused", "paused", {})

    def resume(self, owner: str, id: str) -> Job:
        """Let a paused job go on from where it stopped."""
        self.get(owner, id)
        job = self.find(id)
        back = "queued" if job.facts.get("validated") else "validating_files"
        return self._ask(owner, id, ("paused",), back, "resumed", {})

    def _ask(self, owner: str, id: str, allowed: tuple[str, ...], status: str, done: str, facts: Mapping[str, Any]) -> Job:
        self.get(owner, id)
        if not self.move(id, allowed, status, facts, [Event(f"Fine-tuning job {done}")]):
            now_at = self.get(owner, id).status
            raise InvalidRequest(
                f"Job {id} is {now_at}; only a job that is {' or '.join(allowed)} can be {done}.", parameter="fine_tune_id"
            )
        if status == "cancelled":
            self._files.sweep()
        return self.get(owner, id)

    # the trainer

    def find(self, id: str) -> Job:
        """One job, whoever's it is."""
        return _job(self._store.read("SELECT * FROM jobs WHERE id = ?", (id,))[0])

    def standing(self, *statuses: str) -> list[Job]:
        """Jobs with one of these statuses, oldest first."""
        marks = ", ".join("?" * len(statuses))
        return [
            _job(row) for row in self._store.read(f"SELECT * FROM jobs WHERE status IN ({marks}) ORDER BY number", statuses)
        ]

    def move(
        self,
        id: str,
        allowed: Sequence[str],
        status: str | None,
        facts: Mapping[str, Any] | None = None,
        events: Iterable[Event] = (),
        model: NewModel | None = None,
        also: Callable[[sqlite3.Connection], Any] | None = None,
    ) -> bool:
        """Give a job another status (None: keep it), further facts, events and a model, if it stands where it is `allowed`.
        also: what else belongs into the same transaction.

        False, and nothing has happened, if it does not: a client was quicker.
        """

        def change(connection: sqlite3.Connection) -> bool:
            row = connection.execute("SELECT * FROM jobs WHERE id = ?", (id,)).fetchone()
            if row["status"] not in allowed:
                return False
            known = {**json.loads(row["facts"]), **(facts or {})}
            values = (status or row["status"], json.dumps(known), id)
            connection.execute("UPDATE jobs SET status = ?, facts = ? WHERE id = ?", values)
            if model is not None:
                self._add_model(connection, _job(row), model)
            if also is not None:
                also(connection)
            self._record(connection, id, events)
            return True

        moved = self._store.write(change)
        if moved and status is not None:
            self.changed()
        return moved

    def tell(self, id: str, *events: Event) -> None:
        """Record events of a job."""
        self._store.write(lambda connection: self._record(connection, id, events))

    def steps_told(self, id: str) -> list[dict[str, Any]]:
        """The data of a job's metrics events, in the order of steps."""
        rows = self._store.read("SELECT data FROM events WHERE job = ? AND step IS NOT NULL ORDER BY step", (id,))
        return [json.loads(row["data"]) for row in rows]

    def _record(self, connection: sqlite3.Connection, id: str, events: Iterable[Event]) -> None:
        for event in events:
            if event.step is not None:
                query = "SELECT 1 FROM events WHERE job = ? AND step = ?"
                if connection.execute(query, (id, event.step)).fetchone():
                    continue  # told before an interruption: the same step gives the same numbers
            data = None if event.data is None else json.dumps(dict(event.data))
            values = (new_id("ftevent-"), id, self._clock(), event.level, event.type, event.message, data, event.step)
            columns = "id, job, created_at, level, type, message, data, step"
            connection.execute(f"INSERT INTO events ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)

    # models

    def _add_model(self, connection: sqlite3.Connection, job: Job, model: NewModel) -> None:
        created = self._clock()
        columns = "name, owner, job, folder, step, created_at"
        values = (model.name, job.owner, job.id, model.folder, model.step, created)
        connection.execute(f"INSERT OR REPLACE INTO models ({columns}) VALUES (?, ?, ?, ?, ?, ?)", values)
        if model.step is not None:
            columns = "id, job, created_at, step, model, metrics"
            found = (new_id("ftckpt_"), job.id, created, model.step, model.name, json.dumps(dict(model.metrics or {})))
            connection.execute(f"INSERT OR IGNORE INTO checkpoints ({columns}) VALUES (?, ?, ?, ?, ?, ?)", found)

    def models(self) -> list[sqlite3.Row]:
        """All models that jobs have made and nobody has deleted: rows of the table."""
        return self._store.read("SELECT * FROM models WHERE NOT deleted ORDER BY number")

    def model(self, owner: str, name: str) -> sqlite3.Row | None:
        """One of these, if `owner` may see it."""
        rows = self._store.read("SELECT * FROM models WHERE name = ? AND owner = ? AND NOT deleted", (name, owner))
        return rows[0] if rows else None

    def older_checkpoints(self, id: str, keep: int) -> list[str]:
        """Names of a job's checkpoint models but for the last `keep`."""
        query = "SELECT name FROM models WHERE job = ? AND NOT deleted AND step IS NOT NULL ORDER BY step DESC"
        return [row["name"] for row in self._store.read(query, (id,))[keep:]]

    def delete_model(self, name: str) -> None:
        """Take a model out of the list."""

        def delete(connection: sqlite3.Connection) -> None:
            connection.execute("UPDATE models SET deleted = 1 WHERE name = ?", (name,))
            connection.execute("DELETE FROM checkpoints WHERE model = ?", (name,))

        self._store.write(delete)


def new_seed(job_id: str) -> int:
    """A seed for a job that names none; a later look at the job shows it."""
    return int.from_bytes(job_id.encode()[-4:], "little") & 0x7FFFFFFF


def _job(row: sqlite3.Row) -> Job:
    return Job(
        number=row["number"],
        id=row["id"],
        owner=row["owner"],
        status=row["status"],
        created_at=row["created_at"],
        metadata=None if row["metadata"] is None else json.loads(row["metadata"]),
        asked=json.loads(row["asked"]),
        facts=json.loads(row["facts"]),
    )
