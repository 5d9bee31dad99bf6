"""GET /: the console, a static page of three files without a build step. A fixed table, so no path can lead elsewhere."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Response

import quire.server.console as console_files

router = APIRouter(include_in_schema=False)

_FOLDER = Path(console_files.__path__[0])
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def _file(name: str, kind: str) -> Response:
    return Response((_FOLDER / name).read_bytes(), media_type=f"{kind}; charset=utf-8", headers=_HEADERS)


@router.get("/")
async def page() -> Response:
    """The page."""
    return _file("console.html", "text/html")


@router.get("/console/console.js")
async def script() -> Response:
    """Its script."""
    return _file("console.js", "text/javascript")


@router.get("/console/console.css")
async def style() -> Response:
    """Its style."""
    return _file("console.css", "text/css")
