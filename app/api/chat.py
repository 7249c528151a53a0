"""`POST /v1/chat/completions`: the main road. Parse, ask the gateway, stream or collect."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from actors.types import GenerationCall
from app.api.deps import GenerationStream, InferenceSession, Session, body_of, read_json, timeout_s
from app.api.errors import JsonResponse
from app.schemas.chat import ChatRequest
from app.schemas.chat_answers import AnswerShape, ChatAnswer, ChatEvents
from app.schemas.common import new_id
from app.sse import EventStreamResponse

router = APIRouter(tags=["Chat"])


@router.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest))
async def create_chat_completion(request: Request, session: InferenceSession) -> Response:
    """Answer a conversation; with `retrieval`, from documents and with citations."""
    body = await read_json(request, ChatRequest)
    call = body.to_call(timeout_s=timeout_s(request), request_id=new_id("chatcmpl"))
    if not body.stream:
        return await session.context.guard(_whole(session, body, call))
    stream = await session.context.guard(session.generate(call))
    encoder = ChatEvents(_shape(body, call, stream))
    return EventStreamResponse(stream, encoder, session.context, stream.headers)


async def _whole(session: Session, body: ChatRequest, call: GenerationCall) -> Response:
    stream = await session.generate(call)
    try:
        answer = ChatAnswer(_shape(body, call, stream))
        async for delta in stream:
            answer.add(delta)
        return JsonResponse(answer.body(), headers=dict(stream.headers))
    finally:
        await stream.aclose()


def _shape(body: ChatRequest, call: GenerationCall, stream: GenerationStream) -> AnswerShape:
    return AnswerShape(
        id=call.request.request_id,
        model=body.model,
        choices=call.request.sampling.n,
        service_tier=body.tier_name(),
        logprobs=call.request.sampling.logprobs,
        passages=tuple(stream.passages),
        include_usage=body.wants_usage(),
    )
