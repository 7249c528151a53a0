"""`POST /v1/embeddings`."""

from __future__ import annotations

import asyncio

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from actors.types import Embeddings
from app.api.deps import InferenceSession, body_of, read_json
from app.schemas.embeddings import EmbeddingsRequest, embedding_rows

router = APIRouter(tags=["Embeddings"])
_ROWS_PER_TURN = 64  # about a millisecond of encoding; then other requests have their turn


@router.post("/v1/embeddings", openapi_extra=body_of(EmbeddingsRequest))
async def create_embeddings(request: Request, session: InferenceSession) -> Response:
    """Vectors of up to 2048 texts."""
    body = await read_json(request, EmbeddingsRequest)
    context = session.context
    found = await context.guard(
        session.gateway.embed(session.caller, body.model, body.input, context.clock, body.dimensions)
    )
    context.model = body.model
    return Response(await _encode(body, found), media_type="application/json")


async def _encode(body: EmbeddingsRequest, found: Embeddings) -> bytes:
    rows = []
    for row in embedding_rows(found, body.encoding_format or "float"):
        rows.append(row)
        if len(rows) % _ROWS_PER_TURN == 0:
            await asyncio.sleep(0)
    rest = {"model": body.model, "usage": {"prompt_tokens": found.tokens, "total_tokens": found.tokens}}
    return b'{"object":"list","data":[%b],%b' % (b",".join(rows), msgspec.json.encode(rest)[1:])
