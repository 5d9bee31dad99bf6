"""/v1/fine_tuning/jobs: create, list, look at, cancel, pause, resume; events and checkpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from quire.errors import InvalidRequest
from quire.server.body import described, json_body
from quire.server.routes.openai import OpenAIRoute, after_of, fine_tuning_of, limit_of, listed, owner_of
from quire.server.schema.fine_tuning import JobBody, PermissionBody, shown_checkpoint, shown_event, shown_job, shown_permission
from quire.service.files import Page
from quire.service.jobs import Job

router = APIRouter(route_class=OpenAIRoute)

MOST_LIMIT = 1000


@router.post("/v1/fine_tuning/jobs", openapi_extra=described(JobBody))
async def create(request: Request, body: Annotated[JobBody, Depends(json_body(JobBody))]) -> dict[str, Any]:
    """Start a job; when this is answered, it is on the disk."""
    house = fine_tuning_of(request)
    return shown_job(await asyncio.to_thread(house.create_job, owner_of(request), body.to_request()))


@router.get("/v1/fine_tuning/jobs")
async def jobs(request: Request) -> dict[str, Any]:
    """The caller's jobs, newest first; `metadata[key]=value` takes those that have the pair, `metadata=null` those without."""
    house, wanted = fine_tuning_of(request), {}
    bare = request.query_params.get("metadata") == "null"
    for key, value in request.query_params.multi_items():
        if key.startswith("metadata[") and key.endswith("]"):
            wanted[key[len("metadata[") : -1]] = value
        elif key not in ("after", "limit", "metadata"):
            raise InvalidRequest(
                f"unknown query parameter {key[:100]!r}; known are after, limit and metadata.", parameter=key[:100]
            )
    page = await asyncio.to_thread(
        house.jobs.page,
        owner_of(request),
        after=after_of(request),
        limit=limit_of(request, 20, MOST_LIMIT),
        metadata=wanted,
        bare=bare,
    )
    return listed(page, shown_job)


@router.get("/v1/fine_tuning/jobs/{id}")
async def retrieve(request: Request, id: str) -> dict[str, Any]:
    """One job."""
    return shown_job(await _on_job(request, id, fine_tuning_of(request).jobs.get))


@router.post("/v1/fine_tuning/jobs/{id}/cancel")
async def cancel(request: Request, id: str) -> dict[str, Any]:
    """End a job."""
    return shown_job(await _on_job(request, id, fine_tuning_of(request).jobs.cancel))


@router.post("/v1/fine_tuning/jobs/{id}/pause")
async def pause(request: Request, id: str) -> dict[str, Any]:
    """Stop a job for now."""
    return shown_job(await _on_job(request, id, fine_tuning_of(request).jobs.pause))


@router.post("/v1/fine_tuning/jobs/{id}/resume")
async def resume(request: Request, id: str) -> dict[str, Any]:
    """Let a paused job go on."""
    return shown_job(await _on_job(request, id, fine_tuning_of(request).jobs.resume))


@router.get("/v1/fine_tuning/jobs/{id}/events")
async def events(request: Request, id: str) -> dict[str, Any]:
    """What happened to a job, newest first."""
    return await _rows_of(request, id, fine_tuning_of(request).jobs.events, 20, shown_event)


@router.get("/v1/fine_tuning/jobs/{id}/checkpoints")
async def checkpoints(request: Request, id: str) -> dict[str, Any]:
    """Models that a job made on its way, newest first."""
    return await _rows_of(request, id, fine_tuning_of(request).jobs.checkpoints, 10, shown_checkpoint)


PERMISSIONS = "/v1/fine_tuning/checkpoints/{model}/permissions"


@router.post(PERMISSIONS, openapi_extra=described(PermissionBody))
async def permit(
    request: Request, model: str, body: Annotated[PermissionBody, Depends(json_body(PermissionBody))]
) -> dict[str, Any]:
    """Record permissions of projects for a checkpoint."""
    given = owner_of(request), model, body.project_ids
    rows = await asyncio.to_thread(fine_tuning_of(request).permissions.create, *given)
    return listed(Page(rows, False), shown_permission)


@router.get(PERMISSIONS)
async def permissions(request: Request, model: str) -> dict[str, Any]:
    """What was recorded for a checkpoint, newest first."""
    order = request.query_params.get("order", "descending")
    if order not in ("ascending", "descending"):
        raise InvalidRequest(f"order must be ascending or descending, got {order[:40]!r}.", parameter="order")
    page = await asyncio.to_thread(
        fine_tuning_of(request).permissions.page,
        owner_of(request),
        model,
        after=after_of(request),
        limit=limit_of(request, 10, MOST_LIMIT),
        ascending=order == "ascending",
        project=request.query_params.get("project_id"),
    )
    return listed(page, shown_permission)


@router.delete(PERMISSIONS + "/{id}")
async def withdraw(request: Request, model: str, id: str) -> dict[str, Any]:
    """Forget a permission."""
    await asyncio.to_thread(fine_tuning_of(request).permissions.delete, owner_of(request), model, id)
    return {"id": id, "object": "checkpoint.permission", "deleted": True}


async def _on_job(request: Request, id: str, action: Callable[[str, str], Job]) -> Job:
    return await asyncio.to_thread(action, owner_of(request), id)


async def _rows_of(
    request: Request, id: str, rows: Any, default: int, shown: Callable[[Any], dict[str, Any]]
) -> dict[str, Any]:
    job = await _on_job(request, id, fine_tuning_of(request).jobs.get)
    limit, after = limit_of(request, default, MOST_LIMIT), after_of(request)
    return listed(await asyncio.to_thread(rows, job, after=after, limit=limit), shown)
