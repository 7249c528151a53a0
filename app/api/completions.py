"""`POST /v1/completions`: legacy text completion, several prompts at once."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from actors.types import GenerationCall
from app.api.deps import GenerationStream, InferenceSession, Session, body_of, read_json, timeout_s
from app.api.errors import JsonResponse
from app.api.fan_in import FanIn, open_all
from app.schemas.chat_answers import AnswerShape
from app.schemas.common import new_id
from app.schemas.completion_answers import CompletionAnswer, CompletionEvents
from app.schemas.completions import CompletionRequest
from app.sse import EventStreamResponse

router = APIRouter(tags=["Completions"])


@router.post("/v1/completions", openapi_extra=body_of(CompletionRequest))
async def create_completion(request: Request, session: InferenceSession) -> Response:
    """Continue one or several prompts."""
    body = await read_json(request, CompletionRequest)
    calls = body.to_calls(timeout_s=timeout_s(request), request_id=new_id("cmpl"))
    shape = _shape(body, calls)
    if not body.stream:
        return await session.context.guard(_whole(session, shape, calls))
    stream = await session.context.guard(_open(session, calls))
    return EventStreamResponse(stream, CompletionEvents(shape), session.context, stream.headers)


async def _open(session: Session, calls: list[GenerationCall]) -> GenerationStream | FanIn:
    if len(calls) == 1:
        return await session.generate(calls[0])
    return await open_all(session, calls)


async def _whole(session: Session, shape: AnswerShape, calls: list[GenerationCall]) -> Response:
    stream = await _open(session, calls)
    try:
        answer = CompletionAnswer(shape)
        async for delta in stream:
            answer.add(delta)
        return JsonResponse(answer.body(), headers=dict(stream.headers))
    finally:
        await stream.aclose()


def _shape(body: CompletionRequest, calls: list[GenerationCall]) -> AnswerShape:
    return AnswerShape(
        id=new_id("cmpl") if len(calls) > 1 else calls[0].request.request_id,
        model=body.model,
        choices=sum(call.request.sampling.n for call in calls),
        service_tier=body.tier_name(),
        logprobs=body.logprobs is not None,
        include_usage=body.wants_usage(),
    )
