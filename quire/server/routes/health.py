"""GET /livez, /readyz, /health and /version. No authentication for the first three, and nothing in them but check names."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

import quire
from quire.server.routes.generate import application_of

router = APIRouter()


@router.head("/livez", include_in_schema=False)
@router.get("/livez")
async def livez(request: Request) -> Response:
    """200 as long as a restart would not help."""
    alive = application_of(request).alive()
    return JSONResponse({"status": "alive" if alive else "dead"}, 200 if alive else 503)


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz")
async def readyz(request: Request) -> Response:
    """200 when requests are taken; otherwise 503 and what is missing."""
    failing = application_of(request).failing()
    if not failing:
        return JSONResponse({"status": "ready"})
    return JSONResponse({"status": failing[0], "failing": failing}, 503, headers={"retry-after": "5"})


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(request: Request) -> Response:
    """vLLM's name for readiness: an empty 200 or 503."""
    return Response(status_code=503 if application_of(request).failing() else 200)


@router.get("/version")
async def version() -> dict[str, str]:
    """Quire's version."""
    return {"version": quire.__version__}
