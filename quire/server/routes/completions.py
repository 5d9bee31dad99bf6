"""POST /v1/completions."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from quire.server.body import described, json_body
from quire.server.routes.generate import Layout, generate
from quire.server.schema import completion_answer
from quire.server.schema.completions import CompletionBody

router = APIRouter()
LAYOUT = Layout("cmpl", completion_answer.whole, completion_answer.chunks)


@router.post("/v1/completions", response_class=Response, openapi_extra=described(CompletionBody))
async def completions(request: Request, body: Annotated[CompletionBody, Depends(json_body(CompletionBody))]) -> Response:
    """Continue a text."""
    return await generate(request, body, body.to_request, LAYOUT)
