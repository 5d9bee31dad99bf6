"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from quire.server.body import described, json_body
from quire.server.routes.generate import Layout, generate
from quire.server.schema import chat_answer
from quire.server.schema.chat import ChatBody

router = APIRouter()
LAYOUT = Layout("chatcmpl", chat_answer.whole, chat_answer.chunks)


@router.post("/v1/chat/completions", response_class=Response, openapi_extra=described(ChatBody))
async def chat_completions(request: Request, body: Annotated[ChatBody, Depends(json_body(ChatBody))]) -> Response:
    """Answer a conversation."""
    return await generate(request, body, body.to_request, LAYOUT)
