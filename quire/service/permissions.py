"""Which projects a checkpoint was permitted to: records of what was asked for, as OpenAI's clients keep them.

This server has no projects, so that a record lets nobody in and keeps nobody out; who sees a model is decided by its owner's
key. Knows no HTTP.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

from quire.errors import InvalidRequest, NotFound
from quire.service.files import Page, new_id, page_of
from quire.service.jobs import Jobs
from quire.service.store import Store, now

MOST_PROJECTS = 100
MOST_LETTERS = 64


class Permissions:
    """All permissions of one store: rows of the table."""

    def __init__(self, store: Store, jobs: Jobs, clock: Callable[[], int] = now) -> None:
        self._store, self._jobs, self._clock = store, jobs, clock

    def create(self, owner: str, model: str, projects: Sequence[str]) -> list[sqlite3.Row]:
        """One for each project; a project that has one keeps it."""
        self._check(owner, model)
        if not 1 <= len(projects) <= MOST_PROJECTS:
            message = f"project_ids must be 1 to {MOST_PROJECTS} projects, got {len(projects)}."
            raise InvalidRequest(message, parameter="project_ids")
        for place, project in enumerate(projects):
            if not 1 <= len(project) <= MOST_LETTERS or not project.isprintable():
                raise InvalidRequest(
                    f"project_ids[{place}] must have 1 to {MOST_LETTERS} printable letters, got {project[:80]!r}.",
                    parameter=f"project_ids[{place}]",
                )
        rows = [(new_id("cp_"), owner, model, project, self._clock()) for project in dict.fromkeys(projects)]

        def insert(connection: sqlite3.Connection) -> None:
            columns = "id, owner, model, project, created_at"
            connection.executemany(f"INSERT OR IGNORE INTO permissions ({columns}) VALUES (?, ?, ?, ?, ?)", rows)

        self._store.write(insert)
        marks = ", ".join("?" for _ in rows)
        query = f"SELECT * FROM permissions WHERE model = ? AND project IN ({marks}) ORDER BY number"
        return self._store.read(query, (model, *(row[3] for row in rows)))

    def page(
        self, owner: str, model: str, *, after: str | None, limit: int, ascending: bool, project: str | None
    ) -> Page:
        """Those of one model."""
        self._check(owner, model)
        where, values = "model = ?", [model]
        if project is not None:
            where, values = f"{where} AND project = ?", [*values, project]
        return page_of(
            self._store, "permissions", where, values, after, limit, ascending=ascending, within=("model", model)
        )

    def delete(self, owner: str, model: str, id: str) -> None:
        """Forget one. Raises NotFound."""
        self._check(owner, model)

        def delete(connection: sqlite3.Connection) -> Any:
            return connection.execute("DELETE FROM permissions WHERE id = ? AND model = ?", (id, model)).rowcount

        if not self._store.write(delete):
            raise NotFound(f"No such permission: {id[:100]}", parameter="permission_id")

    def _check(self, owner: str, model: str) -> None:
        if self._jobs.model(owner, model) is None:
            raise NotFound(f"The model `{model[:200]}` does not exist.", parameter="fine_tuned_model_checkpoint")
