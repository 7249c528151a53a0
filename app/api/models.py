"""`GET /v1/models` and `/v1/models/{model}`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from actors.errors import ModelNotFound
from actors.types import ModelCard
from app.api.deps import AnySession
from app.api.errors import JsonResponse
from app.schemas.bad_input import shown

router = APIRouter(tags=["Models"])


@router.get("/v1/models")
async def list_models(session: AnySession) -> Response:
    """What can be named as `model`."""
    cards = await session.gateway.models()
    return JsonResponse({"object": "list", "data": [_model_object(card) for card in cards]})


# A path: Hugging Face ids hold a slash.
@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, session: AnySession) -> Response:
    """One model."""
    for card in await session.gateway.models():
        if card.name == model:
            return JsonResponse(_model_object(card))
    raise ModelNotFound(f"no model is named '{shown(model)}'; see /v1/models", "model")


def _model_object(card: ModelCard) -> dict[str, Any]:
    model = {
        "id": card.name,
        "object": "model",
        "created": card.created_at,
        "owned_by": card.owned_by,
        "type": card.type,  # not OpenAI's: tells chat models from embedding models
    }
    # As vLLM's server says it; unknown until a replica has been there.
    return {**model, "max_model_len": card.context_tokens} if card.context_tokens else model
