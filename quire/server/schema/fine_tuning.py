"""The body of POST /v1/fine_tuning/jobs, and jobs, events, checkpoints and permissions as clients read them.

Every field that OpenAI's specification requires is present in what is written, null where there is nothing to say.
"""

from __future__ import annotations

import json
import sqlite3
from typing import Any, ClassVar

from quire.server.schema.base import RequestBody
from quire.service.job_request import AUTO, JobRequest, job_request
from quire.service.jobs import ORGANIZATION, Job


class JobBody(RequestBody):
    """A job to start. What is inside of `method`, `hyperparameters` and `lora` is checked by service/job_request.py."""

    model: str
    training_file: str
    validation_file: str | None = None
    method: dict[str, Any] | None = None
    hyperparameters: dict[str, Any] | None = None
    suffix: str | None = None
    seed: int | None = None
    metadata: dict[str, Any] | None = None
    integrations: list[Any] | None = None
    lora: dict[str, Any] | None = None

    refused: ClassVar[dict[str, str]] = {}

    def to_request(self) -> JobRequest:
        """The request in the application's words."""
        return job_request({name: getattr(self, name) for name in type(self).model_fields})


class PermissionBody(RequestBody):
    """Permissions to record."""

    project_ids: list[str]

    refused: ClassVar[dict[str, str]] = {}


def shown_job(job: Job) -> dict[str, Any]:
    """A job. Hyperparameters are "auto" until the data is known."""
    facts = job.facts
    hyperparameters = facts.get("hyperparameters") or job.asked["hyperparameters"]
    plain = {name: hyperparameters.get(name, AUTO) for name in ("n_epochs", "batch_size", "learning_rate_multiplier")}
    method = job.asked["method"]
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "finished_at": facts.get("finished_at"),
        "estimated_finish": facts.get("estimated_finish"),
        "model": job.asked["model"],
        "fine_tuned_model": facts.get("fine_tuned_model"),
        "organization_id": f"org-{ORGANIZATION}",
        "result_files": facts.get("result_files", []),
        "status": job.status,
        "trained_tokens": facts.get("trained_tokens"),
        "training_file": job.asked["training_file"],
        "validation_file": job.asked.get("validation_file"),
        "hyperparameters": plain,
        "method": {"type": method, method: {"hyperparameters": dict(hyperparameters)}},
        "seed": facts["seed"],
        "integrations": [],
        "metadata": job.metadata,
        "error": facts.get("error"),
        "user_provided_suffix": job.asked.get("suffix"),
        "lora": {**job.asked["lora"], **({"parity": facts["parity"]} if "parity" in facts else {})},
    }


def shown_event(row: sqlite3.Row) -> dict[str, Any]:
    """An event."""
    return {
        "id": row["id"],
        "object": "fine_tuning.job.event",
        "created_at": row["created_at"],
        "level": row["level"],
        "message": row["message"],
        "type": row["type"],
        "data": {} if row["data"] is None else json.loads(row["data"]),
    }


def shown_checkpoint(row: sqlite3.Row) -> dict[str, Any]:
    """A checkpoint."""
    return {
        "id": row["id"],
        "object": "fine_tuning.job.checkpoint",
        "created_at": row["created_at"],
        "fine_tuned_model_checkpoint": row["model"],
        "fine_tuning_job_id": row["job"],
        "metrics": {"step": row["step"], **json.loads(row["metrics"])},
        "step_number": row["step"],
    }


def shown_permission(row: sqlite3.Row) -> dict[str, Any]:
    """A permission."""
    return {
        "id": row["id"],
        "object": "checkpoint.permission",
        "created_at": row["created_at"],
        "project_id": row["project"],
    }
