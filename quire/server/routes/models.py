"""GET /v1/models, /v1/models/{id}, /v1/presets and /v1/limits: what is served, and within which bounds."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request

from quire import presets
from quire.server.routes.generate import application_of, options_of
from quire.server.routes.openai import fine_tuning_of, owner_of
from quire.service.application import Application

router = APIRouter()


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The names of the model."""
    application = application_of(request)
    names = [*application.model_names, *application.adapter_names(owner_of(request))]
    return {"object": "list", "data": [_card(application, name) for name in names]}


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """One model."""
    application = application_of(request)
    return _card(application, name if name in application.model_names else application.check_model(name, owner_of(request)))


@router.delete("/v1/models/{name:path}")
async def delete_model(request: Request, name: str) -> dict[str, Any]:
    """Forget a model that one of the caller's jobs has made."""
    house = fine_tuning_of(request)
    await asyncio.to_thread(house.remove_model, owner_of(request), name)
    return {"id": name, "object": "model", "deleted": True}


@router.get("/v1/presets")
async def preset_table() -> dict[str, Any]:
    """The scenarios that a request may name."""
    return {"object": "list", "data": [row.as_dict() for row in presets.PRESETS]}


@router.get("/v1/limits")
async def limits(request: Request) -> dict[str, Any]:
    """Bounds of this server and its present load."""
    application, options = application_of(request), options_of(request)
    plan, heartbeat, metrics = application.engine.plan, application.engine.heartbeat(), application.engine.metrics
    return {
        "limits": {
            "max_model_len": plan.max_model_len,
            "max_num_seqs": plan.max_num_seqs,
            "max_num_batched_tokens": plan.max_num_batched_tokens,
            "kv_cache_tokens": plan.kv_tokens,
            "max_concurrency": round(plan.max_concurrency, 2),
            "max_num_queued_reqs": options.max_num_queued_reqs,
            "max_num_queued_tokens": options.max_num_queued_tokens,
            "max_requests_per_key": options.max_requests_per_key,
            "max_samples": application.limits.max_samples,
            "max_logprobs": application.engine.config.max_logprobs,
            "max_body_bytes": options.max_body_bytes,
        },
        "load": {
            "running": heartbeat.running,
            "waiting": heartbeat.waiting,
            "queued_samples": application.admission.samples,
            "queued_prompt_tokens": application.admission.backlog_tokens,
            "kv_cache_usage": metrics.value("vllm:kv_cache_usage_perc"),
            "prompt_tokens": int(metrics.value("vllm:prompt_tokens_total")),
            "generation_tokens": int(metrics.value("vllm:generation_tokens_total")),
            "steps": heartbeat.steps,
        },
    }


def _card(application: Application, name: str) -> dict[str, Any]:
    given = application.engine.config.model
    if application.adapter_of(name) is not None:
        facts = application.adapters.card(name)
        return {
            "id": name,
            "object": "model",
            "created": facts["created"],
            "owned_by": "quire",
            "root": facts["root"],
            "parent": facts["parent"],
            "max_model_len": application.engine.plan.max_model_len,
        }
    return {
        "id": name,
        "object": "model",
        "created": application.started_at,
        "owned_by": "quire",
        "root": Path(given).name if Path(given).is_absolute() else given,
        "parent": None,
        "max_model_len": application.engine.plan.max_model_len,
    }
