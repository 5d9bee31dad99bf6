"""POST /tokenize and POST /detokenize."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from quire.errors import InvalidRequest
from quire.server.body import described, json_body
from quire.server.routes.generate import application_of
from quire.server.routes.openai import owner_of
from quire.server.schema.tokenize import DetokenizeBody, TokenizeBody

router = APIRouter()


@router.post("/tokenize", openapi_extra=described(TokenizeBody))
async def tokenize(request: Request, body: Annotated[TokenizeBody, Depends(json_body(TokenizeBody))]) -> dict[str, Any]:
    """Token ids of a prompt or of a rendered conversation."""
    application = application_of(request)
    adapter = application.adapter_of(application.check_model(body.model, owner_of(request)))
    tokens = await application.tokenize(replace(body.to_request(request.state.request_id), adapter=adapter))
    engine = application.engine
    return {
        "count": len(tokens),
        "max_model_len": engine.plan.max_model_len,
        "tokens": tokens,
        "token_strs": [engine.tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None,
    }


@router.post("/detokenize", openapi_extra=described(DetokenizeBody))
async def detokenize(request: Request, body: Annotated[DetokenizeBody, Depends(json_body(DetokenizeBody))]) -> dict[str, Any]:
    """The text of token ids."""
    application = application_of(request)
    application.check_model(body.model, owner_of(request))
    vocabulary = application.engine.model_config.vocab_size
    outside = [token for token in body.tokens if not 0 <= token < vocabulary]
    if outside:
        raise InvalidRequest(f"tokens must be token ids in [0, {vocabulary - 1}], got {outside[:10]}.", parameter="tokens")
    return {"prompt": await application.detokenize(body.tokens)}
