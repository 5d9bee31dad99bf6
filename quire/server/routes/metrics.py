"""GET /metrics, in Prometheus' text format. Reading it never waits for the engine."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from quire.metrics import CONTENT_TYPE
from quire.server.routes.generate import application_of

router = APIRouter()


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """All counters, gauges and histograms."""
    return Response(application_of(request).engine.metrics.render(), headers={"content-type": CONTENT_TYPE})
