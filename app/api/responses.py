"""`/v1/responses`: answers that are kept, that may run in the background, and whose streams can be resumed.

A background response is in the job log before its caller hears of it; the rest is made while the caller waits and
stored when it is complete. Both are told by facts, so retrieving and streaming are the same for both.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import msgspec
from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from actors.errors import Conflict, InvalidRequest, ShoalError
from actors.policies.prompting import question_of
from actors.policies.responses import Ended, Fact
from actors.stores.responses import Responses, StoredResponse
from actors.types import GenerationCall, Message
from app.api.deps import InferenceSession, Services, Session, body_of, read_json, services, timeout_s
from app.api.errors import JsonResponse
from app.api.response_stream import FollowedAnswer, LiveAnswer, ResponseEventStream
from app.schemas.response_events import ResponseReader, head_of, input_items
from app.schemas.responses import ResponsesRequest

router = APIRouter(tags=["Responses"])

_KEY_CHARS = 255
_CLAIM_S = 300.0  # an idempotency key is held so long for an answer that names no deadline
_LOOK_S = 0.2  # between two looks whether the first answer under a key is there


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponsesCall:
    """An authenticated call on responses."""

    session: Session
    responses: Responses

    @property
    def tenant(self) -> str:
        """Whose responses: from the key alone."""
        return self.session.caller.principal.tenant


async def _call(session: InferenceSession, found: Annotated[Services, Depends(services)]) -> ResponsesCall:
    return ResponsesCall(session=session, responses=cast(Responses, found.responses))


Call = Annotated[ResponsesCall, Depends(_call)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Wanted:
    """A new response, before anything was done for it."""

    id: str
    body: ResponsesRequest
    call: GenerationCall
    stored: StoredResponse
    key: str | None  # Idempotency-Key

    @property
    def reader(self) -> ResponseReader:
        return _reader(self.stored, results=bool(self.body.include))


# --- making --------------------------------------------------------------------------------------------


@router.post("/v1/responses", openapi_extra=body_of(ResponsesRequest))
async def create_response(request: Request, call: Call) -> Response:
    """Answer, with `file_search` from documents; `background` returns at once and runs whatever happens."""
    body = await read_json(request, ResponsesRequest)
    wanted = await _wanted(request, call, body)
    if body.background:
        return await _accepted(call, wanted)
    if wanted.key is None:
        return await _made(call, wanted)
    return await _made_once(call, wanted, wanted.key)


async def _wanted(request: Request, call: ResponsesCall, body: ResponsesRequest) -> _Wanted:
    history: tuple[Message, ...] = ()
    if body.previous_response_id is not None:
        history = await _history(call, body.previous_response_id)
    response_id = call.responses.new_id()
    made = body.to_call(history, timeout_s=timeout_s(request), response_id=response_id)
    stored = StoredResponse(
        head=msgspec.json.encode(head_of(body, response_id, int(time.time()))),
        items=msgspec.json.encode(input_items(body.input, response_id)),
        history=(*history, *body.input),
        background=bool(body.background),
        mark=hashlib.sha256(await request.body()).hexdigest(),
    )
    key = idempotency_key(request)
    if key is not None and body.store is False:
        raise InvalidRequest("'Idempotency-Key' needs 'store': the same answer must be there again", "store")
    return _Wanted(id=response_id, body=body, call=made, stored=stored, key=key)


async def _accepted(call: ResponsesCall, wanted: _Wanted) -> Response:
    session = call.session
    task = await session.accept(wanted.call)
    response_id, stored = await call.responses.accept(task, wanted.stored, wanted.key)
    reader = _reader(stored, results=bool(wanted.body.include))
    if wanted.body.stream:
        source = FollowedAnswer(call.responses.follow(call.tenant, response_id))
        return ResponseEventStream(source, reader, session.context)
    for fact in [] if response_id == wanted.id else await call.responses.facts(call.tenant, response_id):
        reader.add(fact)
    return JsonResponse(reader.body())


async def _made(call: ResponsesCall, wanted: _Wanted) -> Response:
    """Answer while the caller waits."""
    session = call.session
    stream = await session.context.guard(session.generate(wanted.call))
    query = question_of(wanted.call.request.messages or ()) if wanted.call.retrieval else None

    async def keep(facts: list[Fact]) -> bool:
        return await _keep(call, wanted, facts)

    live, reader = LiveAnswer(stream, query, keep), wanted.reader
    if wanted.body.stream:
        return ResponseEventStream(live, reader, session.context, stream.headers)
    await session.context.guard(_read(live, reader))
    if live.error is not None:
        raise live.error
    return JsonResponse(reader.body(), headers=dict(stream.headers))


async def _read(live: LiveAnswer, reader: ResponseReader) -> None:
    try:
        async for facts in live:
            for fact in facts:
                reader.add(fact)
    finally:
        await live.aclose()


async def _keep(call: ResponsesCall, wanted: _Wanted, facts: list[Fact]) -> bool:
    """Store an answer that is complete; the caller gets it all the same when that fails. No facts: it is none."""
    try:
        ended = facts[-1] if facts else None
        if wanted.body.store is False or not isinstance(ended, Ended) or ended.status == "failed":
            if wanted.key is not None:
                await call.responses.unclaim(call.tenant, wanted.key)
            return False
        await call.responses.store(call.tenant, wanted.id, wanted.stored, facts, wanted.key)
    except ShoalError as error:
        call.session.context.note("response_not_stored", error)
        return False
    return True


async def _made_once(call: ResponsesCall, wanted: _Wanted, key: str) -> Response:
    """Answer, or give the answer that the key stands for: whoever comes second waits for it."""
    wait_s = wanted.call.timeout_s or _CLAIM_S
    first_id = await call.responses.claim(call.tenant, key, wanted.id, wanted.stored.mark, wait_s)
    if first_id == wanted.id:
        try:
            return await _made(call, wanted)
        except BaseException:
            await call.responses.unclaim(call.tenant, key)
            raise
    stored = await call.session.context.guard(_stored(call, first_id, wait_s))
    reader = _reader(stored, results=bool(wanted.body.include))
    if wanted.body.stream:
        source = FollowedAnswer(call.responses.follow(call.tenant, first_id))
        return ResponseEventStream(source, reader, call.session.context)
    for fact in await call.responses.facts(call.tenant, first_id):
        reader.add(fact)
    return JsonResponse(reader.body())


async def _stored(call: ResponsesCall, response_id: str, wait_s: float) -> StoredResponse:
    until = asyncio.get_running_loop().time() + wait_s
    while True:
        stored = await call.responses.find(call.tenant, response_id)
        if stored is not None:
            return stored
        if asyncio.get_running_loop().time() > until:
            raise Conflict("the request with this Idempotency-Key is still under way", "Idempotency-Key")
        await asyncio.sleep(_LOOK_S)


async def _history(call: ResponsesCall, previous_id: str) -> tuple[Message, ...]:
    """The conversation up to and with an earlier answer.

    Raises:
        NotFound: there is none of that id.
        InvalidRequest: it has no answer (yet).
    """
    previous = await call.responses.get(call.tenant, previous_id)
    reader = await _told(call, previous_id, previous)
    if reader.status not in ("completed", "incomplete"):
        raise InvalidRequest(
            f"the response before is {reader.status}; it can be gone on from once it is completed",
            "previous_response_id",
        )
    return (*previous.history, Message(role="assistant", content=reader.text))


def idempotency_key(request: Request) -> str | None:
    """The caller's `Idempotency-Key`.

    Raises:
        InvalidRequest: it is too long, or not printable.
    """
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not (0 < len(key) <= _KEY_CHARS and key.isascii() and key.isprintable()):
        raise InvalidRequest(
            f"Idempotency-Key must be 1 to {_KEY_CHARS} printable ASCII characters", "Idempotency-Key"
        )
    return key


# --- looking at, and ending ------------------------------------------------------------------------------


@router.get("/v1/responses/{response_id}")
async def retrieve_response(
    request: Request,
    response_id: str,
    call: Call,
    stream: bool = False,
    starting_after: Annotated[int, Query(ge=-1)] = -1,
) -> Response:
    """A response as it is now; with `stream`, its events behind `starting_after`, and on as they come."""
    stored = await call.responses.get(call.tenant, response_id)
    if not stream:
        if "starting_after" in request.query_params:
            raise InvalidRequest("'starting_after' is allowed only with 'stream=true'", "starting_after")
        return JsonResponse((await _told(call, response_id, stored, request)).body())
    reader = _reader(stored, results=_results_wanted(request))
    source = FollowedAnswer(call.responses.follow(call.tenant, response_id))
    return ResponseEventStream(source, reader, call.session.context, starting_after=starting_after)


@router.post("/v1/responses/{response_id}/cancel")
async def cancel_response(response_id: str, call: Call) -> Response:
    """End a background response wherever it is; one that has ended is shown as it is."""
    await call.responses.cancel(call.tenant, response_id, int(time.time()))
    stored = await call.responses.get(call.tenant, response_id)
    return JsonResponse((await _told(call, response_id, stored)).body())


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, call: Call) -> Response:
    """Remove a response; one that runs is cancelled."""
    await call.responses.delete(call.tenant, response_id, int(time.time()))
    return JsonResponse({"id": response_id, "object": "response", "deleted": True})


@router.get("/v1/responses/{response_id}/input_items")
async def list_input_items(
    response_id: str,
    call: Call,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """What a response was asked."""
    items: list[dict[str, Any]] = msgspec.json.decode(
        (await call.responses.get(call.tenant, response_id)).items
    )
    if order == "desc":
        items.reverse()
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise InvalidRequest("'after' must be the id of an input item of this response", "after")
        items = items[ids.index(after) + 1 :]
    page = items[:limit]
    return JsonResponse(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(items) > limit,
        }
    )


async def _told(
    call: ResponsesCall, response_id: str, stored: StoredResponse, request: Request | None = None
) -> ResponseReader:
    """A response with everything that its log says now."""
    reader = _reader(stored, results=request is not None and _results_wanted(request))
    for fact in await call.responses.facts(call.tenant, response_id):
        reader.add(fact)
    return reader


def _reader(stored: StoredResponse, *, results: bool) -> ResponseReader:
    return ResponseReader(msgspec.json.decode(stored.head), results=results)


def _results_wanted(request: Request) -> bool:
    """Whether the query includes the passages; clients write lists with and without brackets."""
    asked = [*request.query_params.getlist("include"), *request.query_params.getlist("include[]")]
    unknown = next((one for one in asked if one != "file_search_call.results"), None)
    if unknown is not None:
        raise InvalidRequest(
            f"'{unknown[:64]}' cannot be included; allowed: file_search_call.results", "include"
        )
    return bool(asked)
